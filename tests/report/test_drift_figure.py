"""The figure "drift over depth" shows every kind of matrix over depth, also with many layers and kinds."""

import math
from typing import Any

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lit_recon.report.drift_figure import COLORS, drift_figure
from lit_recon.report.figures import STYLE

KINDS = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]


def entry(layer: int, kind: str, local: float, accumulated: float | None) -> dict[str, Any]:
    errors = {"mean": accumulated, "max": None if accumulated is None else 9 * accumulated}
    return {
        "matrix": f"model.layers.{layer}.{kind}.weight",
        "layer": layer,
        "kind": kind,
        "local": {"mean": local, "max": 5 * local},
        "accumulated": None if accumulated is None else errors,
    }


def test_mean_and_worst_token_of_each_kind_are_drawn_over_the_layers_that_have_it() -> None:
    drift = [entry(0, "q", 0.1, 0.1), entry(0, "up", 0.3, 0.4), entry(2, "q", 0.2, 0.5)]
    upper, lower = drift_figure(drift).axes
    drawn = [
        {
            (line.get_linestyle(), line.get_color()): (list(line.get_xdata()), list(line.get_ydata()))
            for line in one.lines
        }
        for one in (upper, lower)
    ]
    q, up = COLORS[:2]
    assert drawn[0][("--", q)] == ([0, 2], [0.1, 0.2]) and drawn[0][("-", q)] == ([0, 2], [0.1, 0.5])
    assert drawn[0][("--", up)] == ([0], [0.3]) and drawn[0][("-", up)] == ([0], [0.4])
    assert drawn[1][("--", q)] == ([0, 2], pytest.approx([0.5, 1.0]))
    assert drawn[1][("-", q)] == ([0, 2], pytest.approx([0.9, 4.5]))
    assert upper.get_yscale() == lower.get_yscale() == "log"


def test_experts_of_one_kind_in_a_layer_are_one_point_and_what_was_not_measured_none() -> None:
    drift = [entry(0, "experts.*.up", 0.1, None), entry(0, "experts.*.up", 0.3, None), entry(1, "experts.*.up", 0, 0)]
    upper, lower = drift_figure(drift).axes
    means, worst = ([list(line.get_ydata()) for line in axes.lines] for axes in (upper, lower))
    assert means[0][0] == pytest.approx(0.2) and worst[0][0] == pytest.approx(1.5)
    assert math.isnan(means[0][1]), "a zero has no place on a logarithmic axis"
    assert len(means[1]) == 1 and math.isnan(means[1][0])


@pytest.mark.parametrize("kinds", [KINDS, [f"feed_forward.experts.*.{name}" for name in "abcdefghijkl"], ["x"]])
@pytest.mark.parametrize("depth", [1, 80])
def test_the_legend_stays_inside_and_kinds_look_different(kinds: list[str], depth: int) -> None:
    drift = [entry(layer, kind, 0.1 + layer, 0.2 + layer) for layer in range(depth) for kind in kinds]
    with matplotlib.rc_context(STYLE):
        figure = drift_figure(drift)
        FigureCanvasAgg(figure).draw()
        extent = figure.legends[0].get_window_extent()
    assert 0 <= extent.x0 and extent.x1 <= figure.bbox.x1 and extent.y1 <= figure.bbox.y1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["local", "accumulated", *kinds]
    handles = figure.legends[0].get_lines()[2:]
    assert len({(line.get_color(), line.get_marker()) for line in handles}) == len(kinds)


@pytest.mark.parametrize("drift", [[], [entry(0, "q", math.nan, None)]], ids=["empty", "not finite"])
def test_a_figure_without_numbers_is_drawn_all_the_same(drift: list[dict[str, Any]]) -> None:
    figure = drift_figure(drift)
    FigureCanvasAgg(figure).draw()
    assert [axes.get_xlim() for axes in figure.axes] == [(-0.5, 0.5)] * 2
