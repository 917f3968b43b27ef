"""TensorBoard's files, read back by its own reader: names in order, steps that do not overlap, curves as trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NAMES = ["block_00", "block_01", "block_02"]


@pytest.fixture
def events(run_once: Callable[..., Ended]) -> EventAccumulator:
    """The log of a run: three windows, eight steps each, every step logged."""
    run_once("trainer.max_epochs=2", "trainer.log_every_n_steps=1", "module.optimizer.lr=1e-2")
    assert len(list(Path("run/tensorboard").iterdir())) == 1
    accumulator = EventAccumulator("run/tensorboard", size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_every_window_has_its_curves_under_its_name_and_nothing_else_is_logged(events: EventAccumulator) -> None:
    curves = {f"{name}/{curve}" for name in NAMES for curve in ("loss/train", "loss/held_out", "lr")}
    depth = {f"depth/{name}_{when}" for name in ("relative_error", "held_out") for when in ("before", "after")}
    finals = {"perplexity/dense", "perplexity/pruned", "perplexity/reconstructed", "gap_recovered"}
    assert set(events.Tags()["scalars"]) == curves | depth | finals


def test_windows_follow_each_other_on_the_x_axis(events: EventAccumulator) -> None:
    last = 0
    for name in NAMES:
        steps = [point.step for point in events.Scalars(f"{name}/loss/train")]
        assert len(steps) == 8
        assert steps == list(range(steps[0], steps[0] + 8))
        held_out = [point.step for point in events.Scalars(f"{name}/loss/held_out")]
        assert held_out[0] == last, "the curve starts where the window does"
        assert min(steps) >= last
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


def test_the_summary_and_the_hyperparameters_are_there(events: EventAccumulator) -> None:
    assert "summary/text_summary" in events.Tags()["tensors"]
    text = events.Tensors("summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| criterion | Wanda |" in text
    assert "_hparams_/experiment" in events.summary_metadata
