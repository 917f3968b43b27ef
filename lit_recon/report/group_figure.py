"""The figure over groups of runs: nats over the dense model before and after, and the memory that it took.

A row per group, a dot per run, the mean and the standard deviation of the runs next to them. In the colours of
figures.py.
"""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lit_recon.report.figures import INK, PRUNED, RECONSTRUCTED, TRAINING, WIDTH
from lit_recon.report.groups import Group, label_of
from lit_recon.report.measures import NATS, NATS_PRUNED, WALK_MEMORY, Measure

ROW = 0.36  # inches
LONGEST = 44  # letters of a label
MOST = 40  # groups, from which on rows would be too many to compare


def group_figure(groups: Sequence[Group]) -> Figure:
    """Nats over the dense model of each group, and peak memory of its walks.

    Args:
        groups: In the order of the rows, from the top.
    """
    figure = Figure((WIDTH, 1.5 + ROW * len(groups)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for row, group in enumerate(groups):
        pruned = group.mean(NATS_PRUNED)
        left.plot(pruned, row, "D", color=PRUNED, markersize=6, markeredgecolor="white", markeredgewidth=0.8)
        _draw_row(left, row, group, NATS)
        _draw_row(right, row, group, WALK_MEMORY)
    left.set_yticks(range(len(groups)), [_label(group) for group in groups])
    left.set(ylim=(len(groups) - 0.4, -0.6), xlabel="nats per token over the dense model (lower is better)")
    right.set(xlabel="peak memory, walk (GB)")
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
    dot: Any = {"linestyle": "", "marker": "o", "color": RECONSTRUCTED}
    handles = [
        Line2D([], [], linestyle="", marker="D", color=PRUNED, markersize=6, label="pruned, mean"),
        Line2D([], [], **dot, markersize=8, label="reconstructed, mean"),
        Line2D([], [], **dot | {"color": TRAINING}, markersize=4, label="one run"),
        Line2D([], [], color=RECONSTRUCTED, linewidth=1.6, label="± standard deviation"),
    ]
    title = " · ".join(map(label_of, groups[0].values)) if groups else ""
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), title=_drawable(title), alignment="left"
    )
    return figure


def _draw_row(axes: Axes, row: int, group: Group, measure: Measure) -> None:
    """Dots of the runs, their mean, and a bar as long as their standard deviation to both sides."""
    values = group.finite(measure)
    mean, deviation = group.mean(measure), group.deviation(measure)
    if len(values) > 1:
        axes.plot(values, [row + 0.22] * len(values), "o", color=TRAINING, markersize=3.5)
    if not math.isnan(mean) and not math.isnan(deviation):
        axes.plot([mean - deviation, mean + deviation], [row, row], "|-", color=RECONSTRUCTED, linewidth=1.6)
    axes.plot(mean, row, "o", color=RECONSTRUCTED, markersize=8, markeredgecolor="white", markeredgewidth=0.8)


def _label(group: Group) -> str:
    """Values of a group, with the number of its runs."""
    name = _drawable(" · ".join(group.values.values()))
    return f"{name if len(name) <= LONGEST else name[: LONGEST - 1] + '…'}  ({len(group.runs)})"


def _drawable(text: str) -> str:
    """Text as matplotlib takes it: names of files need not be UTF-8."""
    return text.encode(errors="backslashreplace").decode()
