"""Folders of many runs some with names that a browser or a spreadsheet might take for more than names."""

import json
import math
from pathlib import Path
from typing import Any

from finished_run import in_units, make_run

MARKUP = "<img src=x onerror=alert(1)>"
SCRIPT = "</script><script>alert(2)</script>"
FORMULA = '=HYPERLINK("http://example.org","x")'
CONFIG = """\
seed: {seed}
output_dir: {name}
data:
  _target_: lit_recon.data.python_docs.PythonDocs
  num_samples: {samples}
criterion:
  _target_: lit_recon.pruning.criteria.{criterion}
module:
  _target_: lit_recon.modules.masked_weights.MaskedWeights
  optimizer:
    _target_: torch.optim.AdamW
    lr: {rate}
"""


def results_of_setting(rate: float, samples: int, seed: int, *, windows: int = 3) -> dict[str, Any]:
    """Results that follow from a setting: more samples are better and slower; by held-out error 1e-3 is best."""
    results = in_units(windows)
    off, noise = abs(math.log10(rate / 1e-3)), 0.05 * seed
    reconstructed = 16 + 40 / samples**0.5 + 2 * abs(math.log10(rate / 3e-4)) + noise
    results["perplexity"] |= {"reconstructed": reconstructed}
    results["gap_recovered"] = (22.3456 - reconstructed) / (22.3456 - 14.9012)
    for window in results["windows"]:
        window["held_out_after"] = window["held_out_before"] * (0.3 + 0.2 * off)
    results["seconds"] |= {"fit": 2.0 * samples, "total": 40 + 2.0 * samples}
    results["walk_peak_memory_bytes"] = int(9e8 + 1e6 * samples)
    results["recipe"] |= {"learning_rate": f"{rate:g}"}
    return results | {"seed": seed, "tokens": {"calibration": 256 * samples}}


def make_many(folder: Path, rates: tuple[float, ...], samples: tuple[int, ...], seeds: tuple[int, ...]) -> list[Path]:
    """A finished run for each rate, number of samples and seed."""
    runs = []
    for rate in rates:
        for number in samples:
            for seed in seeds:
                name = f"lr{rate:g}_n{number}_s{seed}"
                run = make_run(folder / name, results_of_setting(rate, number, seed), curves=False)
                configure(run, rate=rate, samples=number, seed=seed)
                runs.append(run)
    return runs


def configure(run: Path, *, rate: float = 1e-3, samples: int = 32, seed: int = 0, by: str = "wanda.Wanda") -> None:
    """Write the config.yaml of a run."""
    run.mkdir(parents=True, exist_ok=True)
    text = CONFIG.format(seed=seed, name=json.dumps(run.name), samples=samples, criterion=by, rate=f"{rate:.7f}")
    (run / "config.yaml").write_text(text, encoding="utf-8")


def evaluations_of(prompt: str) -> dict[str, Any]:
    """An evaluations.json with all parts, in which prompts are continued well and badly."""
    perplexities = {"dense": 10.0, "pruned": 20.0, "checkpoint": 12.5}
    protocol = {"dataset": f"wikitext2 {prompt}", "split": "test", "context": 2048, "stride": None, "windows": 141}
    nats = {state: math.log(value) for state, value in perplexities.items()}
    names = ["self_attn.q_proj", "mlp.down_proj"]
    return {
        "version": 1,
        "evaluations": [
            {
                "when": "2026-11-28T13:05:00+00:00",
                "checkpoint": "run/checkpoint",
                "dense": "org/dense",
                "seconds": {"load": 1.5, "measure": 90.25, "prompts": 8.25, "total": 100.5},
                "peak_memory_bytes": 1_250_000_000,
                "versions": {"lit_recon": "0.8.0", "torch": "2.13.0"},
                "perplexity": {"protocol": protocol, "nats": nats, "perplexity": perplexities, "gap_recovered": 0.75},
                "agreement": {
                    "kl": 0.0625,
                    "top1": 0.8125,
                    "tokens": 8176,
                    "hidden": [{"layer": n, "mean": 0.02 * (n + 1), "typical": 0.01 * (n + 1)} for n in range(8)],
                },
                "tasks": {
                    "harness": "0.4.9",
                    "results": [
                        {"task": "boolq", "metric": "acc", "state": "checkpoint", "value": 0.625, "stderr": 0.01},
                        {"task": MARKUP, "metric": "acc", "state": "dense", "value": 0.75, "samples": 100},
                    ],
                    "mean": {"checkpoint": 0.625, "dense": 0.75},
                },
                "continuations": [
                    {
                        "prompt": f"Once {prompt}",
                        "texts": {"dense": "upon a time.", "pruned": "the the the the", "checkpoint": f"more {prompt}"},
                        "repetition": {"dense": 0.0, "pruned": 0.875, "checkpoint": 0.0},
                        "degenerates": {"dense": False, "pruned": True, "checkpoint": False},
                    }
                ],
                "drift": [
                    {
                        **{"matrix": f"model.layers.{n}.{name}.weight", "layer": n, "kind": name},
                        **{"local": {"mean": 0.01, "max": 0.1}, "accumulated": {"mean": 0.01 * (n + 2), "max": 0.5}},
                    }
                    for n in range(8)
                    for name in names
                ],
            }
        ],
    }
