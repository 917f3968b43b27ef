"""Files of a run are read whole, or refused with a message."""

import copy
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finished_run import NEW, in_units, make_run, results_of
from torch.utils.tensorboard import SummaryWriter

from lit_recon.report.run_files import read_curves, read_results

ABSENT = object()
OTHERS = (None, True, "text", "", -1, 0, 1e308, 10**400, math.nan, math.inf, [], [1], {}, {"a": [1]}, ABSENT)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where something stands in a value of JSON."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(each, (*path, key))


def changed(results: dict, place: tuple, other: object) -> dict:
    """Results in which something else stands at a place."""
    made = copy.deepcopy(results)
    within = made
    for key in place[:-1]:
        within = within[key]
    if other is ABSENT:
        del within[place[-1]]
    else:
        within[place[-1]] = other
    return made


def test_what_a_version_without_newer_fields_has_left_is_read(tmp_path: Path) -> None:
    for name, results in {
        "old": results_of(2),
        "newer": results_of(2) | NEW,
        "newest": in_units(2),
        "none": results_of(0),
    }.items():
        assert read_results(make_run(tmp_path / name, results, curves=False)) == results


@pytest.mark.parametrize(
    ("place", "other", "message"),
    [
        (("windows", 1, "held_out_after"), "low", "windows[1].held_out_after is 'low' instead of a number or null"),
        (("windows", 0, "steps"), None, "windows[0].steps is 'None' instead of a number"),
        (("windows",), {}, "windows is no list"),
        (("windows", 0), 5, "windows[0] is no mapping of names to values"),
        (("seconds", "load"), math.inf, "seconds.load is 'inf' instead of a number"),
        (("sparsity", "by_matrix"), ABSENT, "without sparsity.by_matrix"),
        (("relative_error",), {"pruned": 1}, "without relative_error.reconstructed"),
        (("windows", 0, "tries"), [0.5], "windows[0].tries[0] is no list"),
        (("tokens", "calibration"), True, "tokens.calibration is 'True' instead of a number"),
    ],
)
def test_what_is_no_result_of_lit_recon_is_named(tmp_path: Path, place: tuple, other: object, message: str) -> None:
    run = make_run(tmp_path / "run", changed(in_units(2), place, other), curves=False)
    with pytest.raises(ValueError) as raised:
        read_results(run)
    assert f"results.json: {message}; expected the folder of a finished run" in str(raised.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_results_are_refused_with_a_message_or_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    """Any one thing of another kind, also such as reports do not look at."""
    from lit_recon.report.__main__ import main

    whole, draw, drawn = in_units(2), random.Random(0), 0
    for number in range(count):
        place, other = draw.choice(list(places(whole))), draw.choice(OTHERS)
        run = make_run(tmp_path / str(number), changed(whole, place, other), curves=False)
        refused, message = main([str(run)]) == 2, capsys.readouterr().err
        assert (message.count("\n") == 1 and "as lit_recon.fit writes it" in message) == refused, (place, other)
        assert (run / "report.html").exists() != refused, (place, other)
        drawn += not refused
    assert 0 < drawn < count


def test_no_point_of_the_curves_is_dropped(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for step in range(10_050):  # more than TensorBoard keeps by default
            writer.add_scalar("block_00/loss/train", step, step)
        for depth in range(3):  # a second x axis, which starts again at zero
            writer.add_scalar("depth/held_out_before", depth / 4, depth)
    curves = read_curves(tmp_path)
    assert curves["block_00/loss/train"] == [(step, step) for step in range(10_050)]
    assert curves["depth/held_out_before"] == [(0, 0.0), (1, 0.25), (2, 0.5)]
