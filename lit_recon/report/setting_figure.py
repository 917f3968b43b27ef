"""Quality over one setting of many runs: a line for each choice of the others, a dot for each value.

Such as nats over epochs by windows, over calibration samples by source, or over sparsity. Runs that differ in nothing
but the seed are one dot, their mean, with their standard deviation. In the colours of pareto.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lit_recon.report.figures import WIDTH, make_logarithmic
from lit_recon.report.groups import Group, differing_keys, grouped, label_of, order, value_of
from lit_recon.report.measures import NATS
from lit_recon.report.pareto import DECADE, PALETTE, legend_text
from lit_recon.report.runs import Run

MOST = 2 * len(PALETTE)  # lines of a figure, from which on they could not be told apart
LONGEST = 60  # letters of a line's label
MARKERS = ("o", "s")  # of the first lines, and of those that have their colours again


class Line(NamedTuple):
    """Runs that differ in one setting and the seed alone.

    Attributes:
        label: What tells it from other lines: the name that the folders of its runs share, or values of settings.
        groups: Its runs by the value of the setting.
    """

    label: str
    groups: Sequence[Group]


@dataclass(frozen=True)
class Curves:
    """Lines over a setting.

    Attributes:
        key: Of the setting.
        title: What the labels of the lines are: names of settings, or "runs".
        lines: The lines.
    """

    key: str
    title: str
    lines: Sequence[Line]


def curves(runs: Sequence[Run]) -> list[Curves]:
    """Lines of finished runs, over each setting that varies by number where all others stay.

    A setting is one if all runs give a number for it, and two of them differ in nothing else but the seed.
    """
    finished = [run for run in runs if run.results is not None and math.isfinite(NATS.of(run))]
    different = differing_keys(finished)
    found = []
    for key in different:
        if all(_is_number(value_of(run, key)) for run in finished):
            others = [other for other in different if other != key]
            alike = [line.runs for line in grouped(finished, others) if len(grouped(line.runs, [key])) > 1]
            if 0 < len(alike) <= MOST:
                labels, title = _labels(alike, others)
                lines = [Line(label, grouped(line, [key])) for label, line in zip(labels, alike, strict=True)]
                lines.sort(key=lambda line: -line.groups[-1].mean(NATS))  # the legend in the order of the right ends
                found.append(Curves(key, title, lines))
    return found


def _is_number(value: str) -> bool:
    is_text, number, _ = order(value)
    return not is_text and math.isfinite(number)


def _labels(lines: Sequence[Sequence[Run]], others: Sequence[str]) -> tuple[list[str], str]:
    """Labels that tell lines apart, and what they are.

    Args:
        lines: The runs of each.
        others: Keys in which lines may differ.
    """
    names = [{run.folder.name for run in line} for line in lines]
    firsts = [min(name) for name in names]
    if all(len(name) == 1 for name in names) and len(set(firsts)) == len(lines):
        return firsts, "runs"
    keys = [key for key in others if len({value_of(line[0], key) for line in lines}) > 1]
    labels = [" · ".join(value_of(line[0], key) for key in keys) for line in lines]
    return labels, "\n".join(map(label_of, keys))


def setting_figure(curves: Curves) -> Figure:
    """Nats over the dense model by the value of a setting."""
    key, lines = curves.key, curves.lines
    figure = Figure((WIDTH, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (label, groups) in enumerate(lines):
        _draw(
            axes,
            key,
            groups,
            legend_text(label, LONGEST),
            PALETTE[index % len(PALETTE)],
            MARKERS[index // len(PALETTE)],
        )
    groups = [group for line in lines for group in line.groups]
    for axis, values in (
        (axes.xaxis, [_number(key, group) for group in groups]),
        (axes.yaxis, [group.mean(NATS) for group in groups]),
    ):
        if 0 < DECADE * min(values) < max(values):
            make_logarithmic(axis)
        else:
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.grid(visible=True, axis="both")
    axes.set(xlabel=label_of(key), ylabel="nats per token over dense\n(lower is better)")
    if len(lines) > 1:
        axes.legend(
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            title=legend_text(curves.title, 10 * LONGEST),
            alignment="left",
        )
    return figure


def _draw(axes: Axes, key: str, groups: Sequence[Group], label: str, color: str, marker: str) -> None:
    """One line, and bars as long as the standard deviation to both sides."""
    points = [(_number(key, group), group.mean(NATS), group.deviation(NATS)) for group in groups]
    style = {"color": color, "marker": marker, "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.8}
    axes.plot([x for x, _, _ in points], [mean for _, mean, _ in points], linewidth=1.6, label=label, **style)  # type: ignore[arg-type]
    for x, mean, deviation in points:
        if math.isfinite(deviation):
            axes.plot([x, x], [mean - deviation, mean + deviation], "_-", color=color, linewidth=1.2)


def _number(key: str, group: Group) -> float:
    return float(group.values[key])
