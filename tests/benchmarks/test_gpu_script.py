"""The benchmark for GPUs: it runs in miniature on a CPU, and counts what it says it counts."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("gpu.py")
_spec = importlib.util.spec_from_file_location("benchmark_of_gpus", SCRIPT)
gpu = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = gpu  # where dataclasses look for their module
_spec.loader.exec_module(gpu)


def test_the_shapes_are_those_of_the_real_models() -> None:
    counted = {made.name: made.depth * made.parameters for made in gpu.SHAPES}
    embeddings = {"Llama 2 7B": 2 * 32000 * 4096, "Llama 2 70B": 2 * 32000 * 8192, "SmolLM2-135M": 49152 * 576}
    real = {"Llama 2 7B": 6.738e9, "Llama 2 70B": 68.98e9, "SmolLM2-135M": 134.5e6}  # parameters, by their cards
    for name, count in real.items():
        assert counted[name] + embeddings[name] == pytest.approx(count, rel=1e-3), name


def test_the_flops_of_a_fit_are_six_per_parameter_and_token_and_half_the_attention() -> None:
    made, data = gpu.shape("two heads", 1, 1, 1, 8, 4, 6, 2, 1), gpu.Data(samples=3, length=5)
    q, k, v, o, gate, up, down = 4 * 4, 4 * 2, 4 * 2, 4 * 4, 4 * 6, 4 * 6, 6 * 4
    products = 6 * (q + k + v + o + gate + up + down) * 3 * 5
    attention = 3 * 2 * (2 * 5 * 5 * 4) / 2 * 3  # forward and backward, two products, the causal half, each sample
    assert gpu.flops_per_layer(made, data) == products + attention


@pytest.mark.slow
def test_it_runs_in_miniature_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--tiny"]) == 0
    said = capsys.readouterr().out
    assert "windows=block, 2 windows" in said and "windows=half, 4 windows" in said
    assert said.count("of the measured peak") == said.count("predicted") == 2
