"""The figure "drift over depth": relative error of each matrix's output, layer by layer.

One colour per kind of matrix; dashed where only that matrix is sparse and its inputs are dense (local), solid in the
sparse model with its own inputs (accumulated). The distance between a kind's two lines is what earlier layers add.
Above, the mean over tokens; below, the worst token, which may be a massive activation.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lit_recon.report.figures import MUTED, WIDTH, make_logarithmic
from lit_recon.report.run_files import finite_or_nan

# Paul Tol's "muted" colours, safe for colour-blind readers, its two lightest darkened, which a dark page would hide;
# none of them is that of a model in the other figures.
COLORS = ("#332288", "#44aa99", "#cc6677", "#117733", "#aa4499", "#999933", "#4a9cc7", "#882255", "#a98f1f")
LINES: Mapping[str, Any] = {"local": "--", "accumulated": "-"}
MARKED = 12  # layers up to which each has a dot
LETTER, LINE = 0.082, 0.62  # inches in the legend: of a letter, and of a line with the space around it
OVER: Mapping[str, Callable[[list[float]], float]] = {
    "mean": statistics.fmean,
    "max": max,
}  # matrices of one kind in one layer, such as experts


def drift_figure(drift: Sequence[Mapping[str, Any]]) -> Figure:
    """Drift over depth, the mean over tokens above the worst token.

    Args:
        drift: Entries of `drift` in evaluations.json; what has no number, such as the accumulated drift of experts, is
            not drawn.
    """
    kinds = list(dict.fromkeys(str(entry["kind"]) for entry in drift))
    figure = Figure((WIDTH, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, over, words in ((upper, "mean", "mean over tokens"), (lower, "max", "worst token")):
        for index, kind in enumerate(kinds):
            for inputs, line in LINES.items():
                _draw(axes, _over_depth(drift, kind, inputs, over), line, index)
        make_logarithmic(axes.yaxis)
        axes.set_ylabel(f"relative error of outputs\n({words})")
    depth = 1 + max((int(entry["layer"]) for entry in drift), default=0)
    lower.set_xlim(-0.5, depth - 0.5)
    lower.xaxis.set_major_locator(MaxNLocator(16, integer=True, min_n_ticks=1))
    lower.set_xlabel(
        "layer (local: only this matrix is sparse, dense inputs; accumulated: all are, with their own inputs)"
    )
    columns = int(WIDTH / (LINE + LETTER * max(map(len, [*LINES, *kinds]))))
    figure.legend(
        handles=_handles(kinds), loc="outside upper left", ncols=max(1, columns), handlelength=2.2, fontsize=9
    )
    return figure


def _over_depth(drift: Iterable[Mapping[str, Any]], kind: str, inputs: str, over: str) -> tuple[list[int], list[float]]:
    """The layers that have numbers of a kind, and the numbers: one for each layer."""
    by_layer: dict[int, list[float]] = {}
    for entry in drift:
        value = finite_or_nan((entry.get(inputs) or {}).get(over))
        if str(entry["kind"]) == kind and not math.isnan(value):
            by_layer.setdefault(int(entry["layer"]), []).append(value)
    return sorted(by_layer), [OVER[over](by_layer[layer]) for layer in sorted(by_layer)]


def _look(index: int) -> dict[str, Any]:
    """Colour of a kind, and a marker where there are more kinds than colours."""
    return {"color": COLORS[index % len(COLORS)], "marker": ["", "^", "s", "D"][index // len(COLORS) % 4]}


def _draw(axes: Axes, points: tuple[list[int], list[float]], line: str, index: int) -> None:
    """One line over depth; zeros, which a logarithmic axis does not have, are left out."""
    layers, values = points
    look = _look(index)
    if len(layers) <= MARKED and not look["marker"]:
        look["marker"] = "o"
    shown = [value if value > 0 else math.nan for value in values]
    axes.plot(layers, shown, line, linewidth=1.3, markersize=3.5, **look)


def _handles(kinds: Sequence[str]) -> list[Line2D]:
    """The legend: what dashes mean, then a colour per kind."""
    lines = [Line2D([], [], color=MUTED, linestyle=line, label=inputs) for inputs, line in LINES.items()]
    return [*lines, *(Line2D([], [], label=kind, linewidth=2, **_look(index)) for index, kind in enumerate(kinds))]
