"""TensorBoard's files, read back by its own reader: names in order, steps that do not overlap, curves as trained."""

import itertools
import queue
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ended
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_recon.reconstruction.tensorboard import RunLogger
from lit_recon.report.run_files import read_curves
from lit_recon.system.signals import stoppable

NAMES = ["block_00", "block_01", "block_02"]


@pytest.fixture
def events(run_once: Callable[..., Ended]) -> EventAccumulator:
    """The log of a run: three windows, eight steps each, every step logged."""
    run_once("trainer.max_epochs=2", "trainer.log_every_n_steps=1", "module.optimizer.lr=1e-2", "loss=mse")
    assert len(list(Path("run/tensorboard").iterdir())) == 2  # of the walk, and of the results
    accumulator = EventAccumulator("run/tensorboard", size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_every_window_has_its_curves_under_its_name_and_nothing_else_is_logged(events: EventAccumulator) -> None:
    curves = {f"{name}/{curve}" for name in NAMES for curve in ("loss/train", "loss/held_out", "lr")}
    depth = {
        f"depth/{name}_{when}" for name in ("relative_error", "held_out", "typical") for when in ("before", "after")
    }
    finals = {"perplexity/dense", "perplexity/pruned", "perplexity/reconstructed"}
    finals |= {"gap_recovered", "gap_recovered_nats", "seconds"}
    assert set(events.Tags()["scalars"]) == curves | depth | finals


def test_windows_follow_each_other_on_the_x_axis(events: EventAccumulator) -> None:
    last = -1
    for name in NAMES:
        steps = [point.step for point in events.Scalars(f"{name}/loss/train")]
        assert len(steps) == 8
        assert steps == list(range(steps[0], steps[0] + 8))
        held_out = [point.step for point in events.Scalars(f"{name}/loss/held_out")]
        assert held_out[0] == last + 1, "the curve starts where the window does"
        assert min(steps) > last
        last = max(steps + held_out)


def test_the_learning_rate_rises_once_and_falls_as_configured(events: EventAccumulator) -> None:
    # 8 steps, warm-up round(0.8) = 1: half, full, then falling by 1/7 of 0.01 per step
    expected = [0.005] + [0.01 * (8 - step) / 7 for step in range(1, 8)]
    rates = [point.value for point in events.Scalars("block_01/lr")]
    assert rates == pytest.approx(expected)


def test_the_first_held_out_value_is_the_error_of_the_pruned_window(events: EventAccumulator) -> None:
    before = [point.value for point in events.Scalars("depth/held_out_before")]
    first = [events.Scalars(f"{name}/loss/held_out")[0].value for name in NAMES]
    assert first == pytest.approx(before, rel=1e-3)


def test_the_summary_the_plan_the_protocol_and_the_hyperparameters_are_there(events: EventAccumulator) -> None:
    assert {f"{name}/text_summary" for name in ("plan", "summary", "protocol")} <= {*events.Tags()["tensors"]}
    text = events.Tensors("summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| criterion | Wanda |" in text
    assert "_hparams_/experiment" in events.summary_metadata


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """All points of all curves, as TensorBoard shows them."""
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def log_window(log: RunLogger, name: str, num_steps: int = 3) -> None:
    """As a Trainer does: the pruned window's error at step 0, then both curves."""
    log.start_window(name)
    for step in range(num_steps):
        log.log_metrics({"loss/held_out": 1.0 - step / 10}, step)
        log.log_metrics({"loss/train": 2.0 - step / 10}, step)


@pytest.mark.parametrize("steps_of_the_killed", [1, 2, 3])
def test_no_value_stands_twice_after_a_kill_within_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_of_the_killed: int
) -> None:
    seconds = itertools.count(1_700_000_000)
    monkeypatch.setattr(time, "time", lambda: next(seconds))  # files are read in the order of their seconds
    whole = RunLogger(tmp_path / "whole")
    for name in NAMES:
        log_window(whole, name)
        whole.end_window()
    whole.close()
    killed = RunLogger(tmp_path / "run")
    log_window(killed, "block_00")
    killed.end_window()
    last_step = killed.last_step  # in the commit of block_00
    log_window(killed, "block_01", steps_of_the_killed)
    killed.close()  # what it had written when it was killed
    resumed = RunLogger(tmp_path / "run", last_step=last_step)
    for name in NAMES[1:]:
        log_window(resumed, name)
        resumed.end_window()
    resumed.close()
    assert curves(tmp_path / "run") == curves(tmp_path / "whole")
    steps = [step for name in NAMES for step, _ in curves(tmp_path / "run")[f"{name}/loss/held_out"]]
    assert steps == list(range(9))


def results_of(num_windows: int) -> dict:
    """Of results.json what is logged."""
    measures = ("relative_error", "held_out", "typical")
    errors = {f"{name}_{when}": 0.5 for name in measures for when in ("before", "after")}
    return {
        "perplexity": {"dense": 14.9, "pruned": 22.3, "reconstructed": 17.3},
        "gap_recovered": 0.68,
        "gap_recovered_nats": 0.63,
        "model": {"name": "tiny"},
        "recipe": {"criterion": "Wanda"},
        "protocol": {"dataset": "words.txt", "context": 32},
        "sparsity": {"prunable": 0.5},
        "seconds": {"total": 12.5},
        "tokens": {"calibration": 256},
        "windows": [dict(errors) for _ in range(num_windows)],
        "seed": 0,
    }


def test_results_that_are_logged_again_stand_once(tmp_path: Path) -> None:
    results = results_of(3)
    for _ in range(2):  # killed before results.json was there, and resumed
        log = RunLogger(tmp_path)
        log.log_results(results)
        log.close()
    found = read_curves(tmp_path)  # every point, also those that TensorBoard hides
    assert [step for step, _ in found["depth/held_out_before"]] == [0, 1, 2]
    assert len(found["perplexity/pruned"]) == 1


@pytest.mark.filterwarnings("ignore:NaN or Inf found in input tensor")
def test_results_that_are_not_finite_and_names_of_any_encoding_are_logged(tmp_path: Path) -> None:
    results = results_of(1) | {"gap_recovered": None}
    results["perplexity"] |= {"pruned": None, "reconstructed": float("inf")}
    results["windows"][0]["held_out_after"] = None
    results["model"]["name"] = "caf\udce9"  # a folder's name in Latin-1
    log = RunLogger(tmp_path)
    log.log_results(results)
    log.close()
    assert set(read_curves(tmp_path)) >= {"perplexity/pruned", "gap_recovered", "depth/held_out_after"}


def test_a_file_where_the_folder_shall_be_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").touch()
    log = RunLogger(tmp_path)
    log_window(log, "block_00")
    log.close()
    assert curves(tmp_path)["block_00/loss/train"]


@pytest.mark.parametrize("during", ["put", "join"])
def test_a_signal_waits_while_tensorboards_queue_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    log = RunLogger(tmp_path)
    log.start_window("block_00")
    whole, ended = getattr(queue.Queue, during), []

    def interrupted(self: queue.Queue, *given: object) -> None:
        with self.mutex:
            signal.raise_signal(signal.SIGINT)
        whole(self, *given)
        ended.append(True)

    with stoppable(), monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(queue.Queue, during, interrupted)
        log.log_metrics({"loss/train": 1.0}, 0)
        log.end_window()
    assert ended
    log.close()
    assert read_curves(tmp_path)["block_00/loss/train"] == [(0, 1.0)]


def test_what_is_logged_later_stands_where_it_belongs_and_its_steps_count_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLogger(tmp_path)
    monkeypatch.setattr("lit_recon.reconstruction.tensorboard.is_there", lambda metrics: False)  # as on a GPU
    for name, loss in (("block_00", 3.0), ("block_01", 1.0)):
        log.start_window(name)
        for step in range(2):
            log.log_later({"loss/train": torch.tensor(loss - step), "lr": 0.5}, step)
        assert log.last_step == log.first_step + 1
        assert f"{name}/loss/train" not in read_curves(tmp_path), "nothing was read yet"
    log.end_window()
    log.experiment.flush()
    found = read_curves(tmp_path)
    assert found["block_00/loss/train"] == [(0, 3.0), (1, 2.0)] and found["block_01/loss/train"] == [(2, 1.0), (3, 0.0)]
    assert found["block_01/lr"] == [(2, 0.5), (3, 0.5)]
