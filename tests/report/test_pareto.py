"""Pareto fronts and their figures."""

import math
import random
from pathlib import Path

from finished_run import in_units
from matplotlib.figure import Figure

from lit_recon.report.pareto import front, pareto_figures, shades_of
from lit_recon.report.runs import FINISHED, Run


def test_the_front_is_what_no_other_run_dominates() -> None:
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 6.0), (3.0, 5.0), (4.0, 4.0), (5.0, 4.5), (math.nan, 0.0), (0.5, math.inf)]
    assert front(points) == [0, 1, 4]
    assert front([]) == [] and front([(1.0, 1.0), (1.0, 1.0)]) == [0]


def test_the_front_agrees_with_its_definition_on_random_points() -> None:
    draw = random.Random(0)
    for _ in range(50):
        points = [(draw.randint(0, 8), draw.randint(0, 8)) for _ in range(draw.randint(1, 20))]
        best = {(x, y) for x, y in points if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)}
        found = [points[index] for index in front(points)]
        assert set(found) == best and len(found) == len(best) and found == sorted(found)


def runs_of(*costs: tuple[int, float]) -> list[Run]:
    """Finished runs by calibration tokens and perplexity."""
    runs = []
    for tokens, perplexity in costs:
        results = in_units(1) | {"tokens": {"calibration": tokens}}
        results["perplexity"] = {"dense": 10.0, "pruned": 40.0, "reconstructed": perplexity}
        runs.append(Run(Path("run"), FINISHED, results=results))
    return runs


def line_of(figure: Figure) -> list[tuple[float, float]]:
    """The points of the front that is drawn."""
    (line,) = [line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post"]
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_figures_show_each_run_the_front_and_its_numbers_in_the_table() -> None:
    runs = runs_of((100, 30.0), (200, 20.0), (300, 25.0))
    figures = pareto_figures(runs, ["a", "b", "a"])
    assert list(figures) == ["pareto_perplexity_calibration_tokens", "pareto_nats_calibration_tokens"]
    perplexity, nats = figures.values()
    assert line_of(perplexity) == [(100, 30.0), (200, 20.0)]
    assert line_of(nats) == [(100, math.log(3)), (200, math.log(2))]
    axes = perplexity.axes[0]
    assert [text.get_text() for text in axes.texts] == ["1", "2"]
    assert sum(line.get_marker() == "o" for line in axes.lines) == 3
    assert axes.get_xlabel() == "calibration tokens" and axes.get_ylabel() == "perplexity\n(lower is better)"
    assert nats.axes[0].get_ylabel() == "nats per token over dense\n(lower is better)"


def test_a_cost_that_all_runs_share_has_no_figure_and_no_run_breaks_one() -> None:
    assert pareto_figures(runs_of((100, 30.0), (100, 20.0)), ["", ""]) == {}
    assert pareto_figures(runs_of((100, math.nan), (200, math.nan)), ["", ""])


def test_colours_follow_the_order_of_values_and_there_are_enough_of_them() -> None:
    shades = shades_of([str(number) for number in (128, 8, 32)])
    assert list(shades) == ["8", "32", "128"] and len(set(shades.values())) == 3
    assert len(shades_of([str(number) for number in range(40)])) == 40
