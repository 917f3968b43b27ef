"""Folders of finished runs, hand-written: what reports are made of in these tests."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

STEPS = 16
REFUSED = {"accepted": False, "held_out_after": 0.0333, "note": "loss was not finite; pruned weights kept"}
NEW = {  # what runs of earlier versions lack
    "relative_error": {"pruned": 0.345678, "reconstructed": 0.123456},
    "walk_peak_memory_bytes": 987_654_321,
    "phase_peak_memory_bytes": {"load": 1_512_345_678, "teacher": 750_000_000, "fit": 987_654_321},
    "predicted": {"seconds": 65.43, "peak_memory_bytes": 1_400_000_000, "walk_peak_memory_bytes": 1_050_000_000},
}


def results_of(num_windows: int) -> dict[str, Any]:
    """A results.json as lit_recon.fit writes it; errors grow with depth and are halved by reconstruction."""
    matrices = ["self_attn.q_proj", "mlp.down_proj"]
    return {
        "perplexity": {"dense": 14.9012, "pruned": 22.3456, "reconstructed": 17.2987},
        "gap_recovered": 0.677941,
        "protocol": {"dataset": "python_docs", "split": "evaluation", "context": 512, "windows": 16, "tokens": 8176},
        "model": {"name": "tiny-llama", "parameters": 134515008, "prunable_parameters": 106168320, "covered": 0.78926},
        "recipe": {"criterion": "Wanda", "pattern": "unstructured 50% per row", "windows": "block", "inputs": "dense"},
        "sparsity": {
            "total": 0.39462,
            "prunable": 0.5,
            "by_matrix": {f"model.layers.{i}.{m}.weight": 0.5 for i in range(num_windows) for m in matrices},
        },
        "windows": [
            {
                "name": f"block_{index:02}",
                "relative_error_before": 0.01 * (index + 1),
                "relative_error_after": 0.004 * (index + 1),
                "held_out_before": 0.011 * (index + 1),
                "held_out_after": 0.0055 * (index + 1),
                "accepted": True,
                "steps": STEPS,
                "seconds": 1.4,
                "note": "",
            }
            for index in range(num_windows)
        ],
        "seconds": {
            "load": 3.2,
            "teacher": 9.0,
            "prune": 1.0,
            "fit": 30.1,
            "advance": 0.5,
            "commit": 0.4,
            "evaluate": 22.0,
            "total": 71.04,
        },
        "peak_memory_bytes": 1512345678,
        "tokens": {"calibration": 8192},
        "versions": {"lit_recon": "0.1.0", "torch": "2.13.0"},
        "seed": 7,
    }


def in_units(num_windows: int) -> dict[str, Any]:
    """The same of today: errors in units of the median dense update, beside them the typical token's and all tries."""
    results = results_of(num_windows) | NEW | {"typical_error": {"pruned": 0.234567, "reconstructed": 0.0987654}}
    for index, window in enumerate(results["windows"]):
        before, after = 0.009 * (index + 1), 0.0027 * (index + 1)
        tried = [[1.0, 2 * after, after], [0.5, window["held_out_after"], after]]
        window |= {"typical_before": before, "typical_after": after, "unit": 2.5, "rate": 0.5}
        window |= {"tries": tried if index == 0 else tried[1:]}
    return results


def make_run(folder: Path, results: dict[str, Any], *, curves: bool = True) -> Path:
    """The folder of a run with these results, and with training curves that fall from window to window."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "config.yaml").write_text("seed: 7\n", encoding="utf-8")
    if curves:
        with SummaryWriter(str(folder / "tensorboard")) as writer:
            for index, window in enumerate(results["windows"]):
                for step in range(STEPS):
                    loss = window["held_out_before"] * 0.95**step
                    writer.add_scalar(f"{window['name']}/loss/train", loss, index * STEPS + step)
                    if step in (0, STEPS - 1):
                        writer.add_scalar(f"{window['name']}/loss/held_out", 1.1 * loss, index * STEPS + step)
                writer.add_scalar("depth/held_out_before", window["held_out_before"], index)
    return folder
