"""Quality over one setting of many runs: a line for each choice of the others, a dot for each value.

Such as nats over epochs by windows, over calibration samples by source, or over sparsity. Runs that differ in nothing
but the seed are one dot, their mean, with their standard deviation. In the colours of pareto.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lit_recon.report.figures import WIDTH, make_logarithmic
from lit_recon.report.groups import Group, differing_keys, grouped, label_of, order, value_of
from lit_recon.report.measures import NATS
from lit_recon.report.pareto import DECADE, PALETTE
from lit_recon.report.runs import Run

MOST = 2 * len(PALETTE)  # lines of a figure, from which on they could not be told apart
LONGEST = 60  # letters of a line's label
MARKERS = ("o", "s")  # of the first lines, and of those that have their colours again


@dataclass(frozen=True)
class Curves:
    """Lines over a setting.

    Attributes:
        key: Of the setting.
        others: Keys of the settings by which lines differ, in the order of their values in the labels.
        lines: Groups of runs by the value of the setting, of each line by its label.
    """

    key: str
    others: Sequence[str]
    lines: Mapping[str, Sequence[Group]]


def curves(runs: Sequence[Run]) -> list[Curves]:
    """Lines of finished runs, over each setting that varies by number where all others stay.

    A setting is one if all runs give a number for it, and two of them differ in nothing else but the seed.
    """
    finished = [run for run in runs if run.results is not None and math.isfinite(NATS.of(run))]
    different = differing_keys(finished)
    found = []
    for key in different:
        if all(math.isfinite(order(value_of(run, key))[1]) and not order(value_of(run, key))[0] for run in finished):
            others = [other for other in different if other != key]
            lines = {_label(line): grouped(line.runs, [key]) for line in grouped(finished, others)}
            lines = {label: groups for label, groups in lines.items() if len(groups) > 1}
            if 0 < len(lines) <= MOST:
                found.append(Curves(key, others, lines))
    return found


def setting_figure(curves: Curves) -> Figure:
    """Nats over the dense model by the value of a setting."""
    key, lines = curves.key, curves.lines
    figure = Figure((WIDTH, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (label, groups) in enumerate(lines.items()):
        _draw(axes, key, groups, label, PALETTE[index % len(PALETTE)], MARKERS[index // len(PALETTE)])
    values = [_number(key, group) for groups in lines.values() for group in groups]
    if 0 < DECADE * min(values) < max(values):
        make_logarithmic(axes.xaxis)
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.grid(visible=True, axis="both")
    axes.set(xlabel=label_of(key), ylabel="nats per token over dense\n(lower is better)")
    if len(lines) > 1:
        title = "\n".join(label_of(other) for other in curves.others)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title=title, alignment="left")
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


def _label(line: Group) -> str:
    """The values that tell a line from others; letters that a font may lack are escaped."""
    name = " · ".join(line.values.values()).encode(errors="backslashreplace").decode()
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
