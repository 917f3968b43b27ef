"""Figures show the numbers of a run, whatever its depth."""

from pathlib import Path

import pytest
from finished_run import NEW, REFUSED, STEPS, in_units, make_run, results_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from lit_recon.report.figures import error_over_depth, learning_curves, peak_memory, write_figures
from lit_recon.report.run_files import read_curves, read_results

FIGURES = ["perplexity", "error_over_depth", "learning_curves", "time", "memory"]


@pytest.mark.parametrize("num_windows", [2, 30, 100])
def test_every_figure_is_a_readable_png_with_content(tmp_path: Path, num_windows: int) -> None:
    run = make_run(tmp_path / "run", in_units(num_windows))
    paths = write_figures(run)
    assert paths == [run / "figures" / f"{name}.png" for name in FIGURES]
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width == 1500 and image.height > 150
            colors = image.convert("RGB").getcolors(maxcolors=1 << 24)
        background = max(count for count, _ in colors)
        assert len(colors) > 20 and background < 0.97 * 1500 * image.height
    assert sum(path.stat().st_size for path in paths) < 300_000


def test_the_depth_figure_shows_the_held_out_errors_before_and_after() -> None:
    upper, lower = error_over_depth(results_of(3)["windows"]).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in upper.lines}
    assert lines["pruned"] == pytest.approx([0.011, 0.022, 0.033])
    assert lines["reconstructed"] == pytest.approx([0.0055, 0.011, 0.0165])
    left = {line.get_label(): list(line.get_ydata()) for line in lower.lines}
    assert left["held-out"] == pytest.approx([0.5] * 3) and left["calibration"] == pytest.approx([0.4] * 3)
    assert upper.get_yscale() == "log" and lower.get_ylim()[0] == 0


def test_the_depth_figure_shows_the_typical_token_beside_the_mean() -> None:
    upper, lower = error_over_depth(in_units(3)["windows"]).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in upper.lines}
    assert lines["pruned"] == pytest.approx([0.011, 0.022, 0.033])
    assert lines["pruned, typical token"] == pytest.approx([0.009, 0.018, 0.027])
    assert lines["reconstructed, typical token"] == pytest.approx([0.0027, 0.0054, 0.0081])
    left = {line.get_label(): list(line.get_ydata()) for line in lower.lines}
    assert left["held-out, typical token"] == pytest.approx([0.3] * 3) and left["held-out"] == pytest.approx([0.5] * 3)
    assert upper.get_ylabel() == "held-out relative error\n(median dense update = 1)"


def test_the_legend_fits_also_where_a_window_was_refused() -> None:
    windows = in_units(30)["windows"]
    windows[3] |= REFUSED
    figure = error_over_depth(windows)
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        legend = axes.get_legend()
        assert legend is not None and legend.get_window_extent().x1 <= figure.bbox.x1
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["pruned", "reconstructed", "typical token", "not accepted, pruned weights kept"]


@pytest.mark.parametrize(
    ("results", "loss", "label"),
    [
        (results_of(2), None, "loss (variance of the target = 1)"),
        (in_units(2), None, "loss (median dense update = 1)"),
        (in_units(2), "mean_squared", "loss (median dense update = 1)"),
        (in_units(2), "cosine", "loss"),
    ],
    ids=["until version 0.4", "default", "mse", "cosine"],
)
def test_the_unit_of_the_curves_is_that_of_the_run_and_of_its_loss(results: dict, loss: str | None, label: str) -> None:
    figure = learning_curves(results["windows"], {"block_00/loss/held_out": [(0, 0.02)]}, loss)
    assert figure is not None and figure.axes[0].get_ylabel() == label


def bars_of(results: dict) -> dict[str, float]:
    """The bars of the figure of memory, in GB by name."""
    figure = peak_memory(results)
    assert figure is not None
    axes = figure.axes[0]
    lengths = [bar.get_width() for bar in axes.patches]
    return dict(zip([label.get_text() for label in axes.get_yticklabels()], lengths, strict=True))


def test_the_figure_of_memory_has_a_bar_for_each_phase_whose_peak_is_known() -> None:
    bars = bars_of(results_of(1) | NEW)
    names = ["load", "teacher", "fit", "walk", "walk, predicted", "whole run", "whole run, predicted"]
    assert list(bars) == names
    assert bars["teacher"] == pytest.approx(0.75) and bars["fit"] == pytest.approx(0.987654321)
    for unknown in ({}, None):
        assert list(bars_of(results_of(1) | NEW | {"phase_peak_memory_bytes": unknown})) == names[3:]
    assert list(bars_of(results_of(1))) == ["whole run"], "of a run of an earlier version"


def test_each_window_has_its_own_column_in_the_learning_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", results_of(30))
    figure = learning_curves(read_results(run)["windows"], read_curves(run))
    assert figure is not None
    train = [line for line in figure.axes[0].lines if len(line.get_xdata()) == STEPS]
    held_out = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert len(train) == len(held_out) == 30
    for index in range(30):
        start, end = held_out[index].get_xdata()
        assert index - 0.5 < start < end < index + 0.5
        assert train[index].get_xdata()[[0, -1]] == pytest.approx([start, end])
        assert train[index].get_ydata()[0] == pytest.approx(0.011 * (index + 1))


def test_a_window_with_one_logged_point_has_it_at_the_end_of_its_column() -> None:
    windows = results_of(2)["windows"]
    figure = learning_curves(windows, {"block_01/loss/held_out": [(31, 0.02)]})
    assert figure is not None
    (line,) = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert line.get_xdata() == pytest.approx([1.4]) and line.get_marker() == "o"


def test_of_two_attempts_at_a_window_the_second_is_drawn() -> None:
    first, second = [(0, 0.9), (1, float("nan"))], [(0, 0.5), (1, 0.4), (2, 0.3)]
    figure = learning_curves(results_of(1)["windows"], {"block_00/loss/train": first + second})
    assert figure is not None
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.5, 0.4, 0.3]
