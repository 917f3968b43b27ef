"""Precision by measurement: bf16-mixed where a step of the model's first layer is faster in it, else float32."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CPU, Ended, numbers, tiny_settings

from lit_recon.model import precision
from lit_recon.model.architectures import tiny_model
from lit_recon.model.precision import BOTH, describe_measured, time_steps, with_measured_precision
from lit_recon.system import device
from lit_recon.system.cache import cache_folder
from lit_recon.system.device import Compute

BF16 = replace(CPU, precision="bf16-mixed")  # what the instructions alone say


@pytest.fixture(autouse=True)
def instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with instructions for bfloat16."""
    for module in (precision, device):
        monkeypatch.setattr(module, "bf16_is_fast", lambda device: device.type == "cpu")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """How many times as fast bf16 is, for each measurement that is made; the first entry goes with each."""
    ratios: list[float] = []
    monkeypatch.setattr(precision, "time_steps", lambda *_: {"32-true": ratios.pop(0), "bf16-mixed": 1.0})
    yield ratios


@pytest.mark.parametrize(
    ("ratio", "expected"), [(1.6, "bf16-mixed"), (1.3, "bf16-mixed"), (1.29, "32-true"), (0.4, "32-true")]
)
def test_bf16_must_be_1_3_times_as_fast(timed: list[float], ratio: float, expected: str) -> None:
    timed.append(ratio)
    chosen = with_measured_precision(BF16, tiny_model("llama"), 64)
    assert chosen.precision == expected and chosen.device == CPU.device
    assert f"{ratio:.2g} times" in describe_measured(chosen)


def test_what_was_measured_is_kept_by_threads_and_layer(timed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    llama, gpt2 = tiny_model("llama"), tiny_model("gpt2")
    timed.extend([2.0, 0.5, 0.7, 3.0])
    first = with_measured_precision(BF16, llama, 64)
    assert with_measured_precision(BF16, llama, 64).measured == first.measured, "not measured again"
    assert with_measured_precision(BF16, gpt2, 64).precision == "32-true"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert with_measured_precision(BF16, llama, 64).measured["32-true"] == 0.7
    assert timed == [3.0]


def test_without_the_instructions_or_on_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "time_steps", lambda *_: pytest.fail("measured"))
    on_gpu = Compute(torch.device("mps"), "bf16-mixed")
    assert with_measured_precision(on_gpu, tiny_model("llama"), 64) is on_gpu
    monkeypatch.setattr(precision, "bf16_is_fast", lambda device: False)
    assert with_measured_precision(CPU, tiny_model("llama"), 64) is CPU


def test_a_layer_that_cannot_be_timed_runs_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a model's own code")

    monkeypatch.setattr(precision, "time_steps", fail)
    assert with_measured_precision(BF16, tiny_model("llama"), 64).precision == "32-true"


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_step_of_the_first_layer_is_timed_in_both_precisions(shape: str) -> None:
    before = torch.random.get_rng_state()
    seconds = time_steps(tiny_model(shape), 32)
    assert sorted(seconds) == sorted(BOTH) and all(0 < one < 5 for one in seconds.values())
    assert torch.equal(torch.random.get_rng_state(), before), "what a run draws does not depend on it"


def test_a_run_says_what_was_measured_and_resumes_in_the_precision_that_it_began_in(
    command: Callable[..., Ended], model_folder: Path, text_file: Path, timed: list[float], tmp_path: Path
) -> None:
    settings = [*tiny_settings(model_folder, text_file), f"output_dir={tmp_path / 'run'}"]
    timed.append(1.7)
    ended = command(*settings, "stop_after=1")
    assert ended.status == 0, ended.err
    assert "bf16-mixed is 1.7 times as fast" in ended.out
    cache_folder().joinpath("precision").rename(tmp_path / "elsewhere")  # another machine
    timed.append(0.4)
    ended = command(f"resume={tmp_path / 'run'}")
    assert ended.status == 0, ended.err
    assert numbers(tmp_path / "run")["protocol"]["precision"] == "bf16-mixed"
