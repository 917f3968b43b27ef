"""The dense model is measured once for all runs that share it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CPU, Ended, numbers, tiny_settings
from torch import Tensor

from lit_recon.data.source import Samples
from lit_recon.evaluate.evaluator import Evaluator, Measured
from lit_recon.fit import dense_measure
from lit_recon.fit.dense_measure import DenseMeasure
from lit_recon.model.architectures import tiny_model
from lit_recon.system.clock import Clock


@pytest.fixture
def measure(tokens_ST: Tensor) -> DenseMeasure:
    samples = Samples(tokens_ST[:2], tokens_ST[2:3], tokens_ST, "random tokens")
    return DenseMeasure(Evaluator(samples, 16, CPU, Clock()), {"files": "1"})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each time that a model is measured."""
    times, usual = [], Evaluator.measure

    def noting(self: Evaluator, *args: object) -> Measured:
        times.append(1)
        return usual(self, *args)

    monkeypatch.setattr(Evaluator, "measure", noting)
    return times


def same(one: Measured, other: Measured) -> bool:
    return one.by_sample == other.by_sample and torch.equal(one.states_STD, other.states_STD)


def test_a_model_is_measured_once_and_read_with_the_same_bits(measure: DenseMeasure, measured: list[int]) -> None:
    model = tiny_model("llama")
    assert not measure.is_known
    first = measure.of(model)
    assert measure.is_known and same(first, measure.evaluator.measure(model))
    measured.clear()
    assert same(measure.of(model), first) and not measured


@pytest.mark.parametrize("what", ["model", "text", "given", "compared", "batch", "precision"])
def test_whatever_decides_the_numbers_makes_another_measurement(measure: DenseMeasure, what: str) -> None:
    evaluator, samples = measure.evaluator, measure.evaluator.samples
    in_16_bits = replace(CPU, precision="bf16-mixed")
    other = {
        "model": lambda: replace(measure, model={"files": "2"}),
        "text": lambda: of(evaluator, replace(samples, evaluation_ST=samples.evaluation_ST.flip(1))),
        "given": lambda: of(evaluator, replace(samples, opening_length=2)),
        "compared": lambda: of(evaluator, replace(samples, held_out_ST=samples.calibration_ST)),
        "batch": lambda: replace(measure, evaluator=replace(evaluator, tokens_per_batch=8)),
        "precision": lambda: replace(measure, evaluator=replace(evaluator, compute=in_16_bits)),
    }[what]()
    assert other.folder != measure.folder
    assert replace(measure).folder == measure.folder


def of(evaluator: Evaluator, samples: Samples) -> DenseMeasure:
    return DenseMeasure(replace(evaluator, samples=samples), {"files": "1"})


def test_a_damaged_measurement_is_made_again(measure: DenseMeasure, measured: list[int]) -> None:
    model = tiny_model("llama")
    first = measure.of(model)
    path = measure.folder / dense_measure.FILE
    path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    measured.clear()
    assert same(measure.of(model), first) and measured == [1]
    assert same(measure.of(model), first) and measured == [1]


def test_without_a_cache_it_is_measured_each_time(
    measure: DenseMeasure, measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIT_RECON_CACHE", str(tmp_path / "file" / "cache"))
    model = tiny_model("llama")
    assert same(measure.of(model), measure.of(model)) and measured == [1, 1]


def test_old_measurements_go(measure: DenseMeasure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_measure, "KEPT", 2)
    model, made = tiny_model("llama"), [replace(measure, model={"files": str(number)}) for number in range(3)]
    for one in made:
        one.of(model)
    assert [one.is_known for one in made] == [False, True, True]
    assert len(list(measure.folder.parent.iterdir())) == 4  # and their locks


def test_a_second_run_reads_what_the_first_has_measured(
    command: Callable[..., Ended], model_folder: Path, text_file: Path, measured: list[int], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        measured.clear()
        ended = command(*tiny_settings(model_folder, text_file), f"output_dir={tmp_path / name}")
        assert ended.status == 0, ended.err
    assert len(measured) == 2, "pruned and reconstructed"
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")
