"""The real thing: `python -m lit_recon.fit` on SmolLM2-135M with few samples, in a process and an empty folder."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_recon.pruning.masks import Masks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.smollm2,
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.20"), reason="this transformers is refused for the GGUF file"
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a quarter of the default calibration and evaluation text; the user's cache keeps the model."""
    folder = tmp_path_factory.mktemp("smollm2")
    settings = ["data.num_samples=8", "data.num_held_out=2", "data.evaluation_samples=4", "output_dir=run"]
    environment = {key: value for key, value in os.environ.items() if key != "LIT_RECON_CACHE"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "-m", "lit_recon.fit", *settings], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return folder / "run"


def test_reconstruction_recovers_a_quarter_of_the_gap_within_the_memory_bound(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    perplexity = results["perplexity"]
    assert perplexity["dense"] < perplexity["reconstructed"] < perplexity["pruned"]
    assert results["gap_recovered"] > 0.25
    assert results["sparsity"]["prunable"] == 0.5
    assert results["peak_memory_bytes"] < 2.5e9
    assert len(results["windows"]) == 30
    assert sum(window["accepted"] for window in results["windows"]) >= 25


def test_the_checkpoint_generates_text_with_exact_zeros(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoint")
    masks = Masks.load(run / "masks.safetensors")
    assert len(masks) == 210
    assert all(torch.count_nonzero(model.get_parameter(name)[~masks[name]]) == 0 for name in masks)
    prompt = tokenizer("The for statement is used to iterate", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert len(tokenizer.decode(output[0]).split()) > 8


def test_every_window_has_its_curves_in_tensorboard_in_order(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    last = 0
    for index in range(30):
        for curve in ("loss/train", "loss/held_out", "lr"):
            points = events.Scalars(f"block_{index:02}/{curve}")
            assert all(math.isfinite(point.value) for point in points)
            assert points[0].step >= last
        last = events.Scalars(f"block_{index:02}/loss/held_out")[-1].step
    assert [point.step for point in events.Scalars("depth/relative_error_after")] == list(range(30))
