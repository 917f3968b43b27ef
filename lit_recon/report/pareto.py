"""Pareto figures over many runs: what a better model costs in calibration tokens, seconds and memory.

A run is on the front if no other one is at least as good at no higher cost, and better in one of the two. Only runs on
the front are worth their cost; the line through them is what can be had. In the colours of figures.py.
"""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from lit_recon.report.figures import AXIS, INK, MUTED, RECONSTRUCTED, make_logarithmic
from lit_recon.report.groups import order
from lit_recon.report.measures import NATS, PERPLEXITY, SECONDS, TOKENS, WALK_MEMORY, Measure
from lit_recon.report.runs import Run

COSTS = {TOKENS: "calibration tokens", SECONDS: "wall time, total (seconds)", WALK_MEMORY: "peak memory, walk (GB)"}
QUALITIES = {PERPLEXITY: "perplexity", NATS: "nats per token over dense"}
SIZE = (5.0, 3.7)  # inches; two stand side by side on a page
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#5b6470")  # Okabe and Ito's
DECADE = 10  # costs that differ by more than this factor are on a logarithmic axis


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point dominates, by rising cost; both numbers are better where smaller.

    Args:
        points: Cost and quality of each; one that is not finite is on no front.

    Returns:
        Of points that are equal in both numbers, only the first.
    """
    finite = [(*point, index) for index, point in enumerate(points) if all(map(math.isfinite, point))]
    best, found = math.inf, []
    for _, quality, index in sorted(finite):
        if quality < best:
            best = quality
            found.append(index)
    return found


def pareto_figures(runs: Sequence[Run], colors: Sequence[str]) -> dict[str, Figure]:
    """A figure per cost and quality, by name; none for a cost that is the same in all runs.

    Args:
        runs: The runs in the order of the table, which numbers them from 1.
        colors: What each run is coloured by, as text; the same for all: one colour.
    """
    figures = {}
    for cost, cost_label in COSTS.items():
        if len({value for value in map(cost.of, runs) if math.isfinite(value)}) < 2:
            continue
        for quality, quality_label in QUALITIES.items():
            name = f"pareto_{quality.key.partition('_')[0]}_{cost.key}"
            figures[name] = pareto_figure(runs, colors, (cost, cost_label), (quality, quality_label))
    return figures


def pareto_figure(
    runs: Sequence[Run], colors: Sequence[str], cost: tuple[Measure, str], quality: tuple[Measure, str]
) -> Figure:
    """Runs by cost and quality, the front drawn; the numbers of those on it are those of the table.

    Args:
        runs: The runs.
        colors: What each is coloured by.
        cost: The measure to the right, and the axis' label.
        quality: The measure upwards, lower is better, and the axis' label.
    """
    points = [(cost[0].of(run), quality[0].of(run)) for run in runs]
    figure = Figure(SIZE, layout="constrained")
    axes = figure.add_subplot()
    drawn = [(point, color) for point, color in zip(points, colors, strict=True) if all(map(math.isfinite, point))]
    shades = shades_of([color for _, color in drawn])
    for (x, y), color in drawn:
        axes.plot(x, y, "o", color=shades[color], markersize=6, markeredgecolor="white", markeredgewidth=0.8, zorder=3)
    best = front(points)
    axes.plot(
        [points[index][0] for index in best],
        [points[index][1] for index in best],
        drawstyle="steps-post",  # at a cost, the best quality that can be had
        color=AXIS,
        linewidth=1.6,
        zorder=2,
    )
    for index in best:
        axes.annotate(str(index + 1), points[index], (5, 5), textcoords="offset points", color=INK, fontsize=8.5)
    for axis, values in ((axes.xaxis, [x for x, _ in points]), (axes.yaxis, [y for _, y in points])):
        positive = [value for value in values if math.isfinite(value)]
        if positive and 0 < DECADE * min(positive) < max(positive):
            make_logarithmic(axis)
        else:
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.grid(visible=True, axis="both")
    axes.set(xlabel=cost[1], ylabel=f"{quality[1]}\n(lower is better)")
    color_legend(axes, shades)
    return figure


def shades_of(colors: Sequence[str]) -> dict[str, str]:
    """A colour for each text; grey for all from the eighth on."""
    texts = sorted(set(colors), key=order)
    shades = {text: PALETTE[min(index, len(PALETTE) - 1)] for index, text in enumerate(texts)}
    return shades if len(texts) > 1 else dict.fromkeys(texts, RECONSTRUCTED)


def color_legend(axes: Axes, shades: dict[str, str]) -> None:
    """Legend above the axes: what the colours stand for, and the line."""
    shown = list(shades.items())[: len(PALETTE) - 1] if len(shades) > 1 else []
    dots = [Line2D([], [], linestyle="", marker="o", color=shade, label=legend_text(text)) for text, shade in shown]
    if len(shades) > len(shown) > 0:
        dots.append(Line2D([], [], linestyle="", marker="o", color=PALETTE[-1], label="others"))
    line = Line2D([], [], color=AXIS, linewidth=1.6, label="front")
    axes.legend(
        handles=[line, *dots],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        fontsize=8,
        labelcolor=MUTED,
        handlelength=1.2,
        columnspacing=1.2,
    )


def legend_text(text: str, longest: int = 26) -> str:
    """Text that fits into a legend, as matplotlib takes it: names of files need not be UTF-8."""
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
