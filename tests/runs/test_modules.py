"""Complete runs of each module: what was trained is in the checkpoint, with its zeros, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from launcher import Ended
from safetensors.torch import load_file


@pytest.mark.parametrize(
    ("overrides", "added"),
    [
        (["module=mask_lora", "module.rank=4", "start=least_squares"], set()),
        (["module=norms_biases", "module.add_biases=true"], {"mlp.up_proj.bias", "self_attn.q_proj.bias"}),
        (["module=none"], set()),
    ],
    ids=["mask_lora", "norms_biases", "none"],
)
def test_a_run_saves_the_model_that_it_trained_and_no_more(
    tiny_run: Callable[..., Ended], model_folder: Path, overrides: list[str], added: set[str]
) -> None:
    ended = tiny_run(*overrides)
    assert ended.status == 0, ended.err
    dense = load_file(model_folder / "model.safetensors")
    saved = {
        name: one for path in Path("run/checkpoint").glob("*.safetensors") for name, one in load_file(path).items()
    }
    extra = {name.split(".", 3)[-1] for name in saved.keys() - dense.keys()}
    assert dense.keys() <= saved.keys() and added <= extra and bool(added) == bool(extra)
    results = json.loads(Path("run/results.json").read_text())
    assert results["sparsity"]["prunable"] == pytest.approx(0.5, abs=1e-3)
    notes = {window["note"] for window in results["windows"]}
    if overrides == ["module=none"]:
        assert notes == {"nothing of it is trained: kept its pruned weights"}
