"""The figure of a study: what each criterion costs before and after reconstruction, in nats over the dense model.

A row per criterion, from the pruned to the reconstructed model, the best of the pruned ones first; below them the range
of both. At the scale of random masks the others would lie on each other: a worst criterion that is far from them is
written, not drawn. In the colours of figures.py.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lit_recon.report.figures import (
    BETTER,
    DENSE,
    GRID,
    INK,
    MUTED,
    PRUNED,
    RECONSTRUCTED,
    STYLE,
    WIDTH,
    WORSE,
    legend,
    png,
)
from lit_recon.report.format import as_nats
from lit_recon.report.study import STATES, Spread, Study
from lit_recon.system.atomic_files import replaced

COLORS = {"pruned": PRUNED, "reconstructed": RECONSTRUCTED}
DOT: Any = {"marker": "o", "markersize": 10, "markeredgecolor": "white", "markeredgewidth": 1.5}
TEXT: Any = {"textcoords": "offset points", "bbox": {"color": "white", "pad": 0.5}}  # also where a line crosses it
ROW = 0.36  # inches
FAR = 5  # times the nats of the second worst criterion, from which the worst one is off the scale


def write_study_figure(study: Study) -> None:
    """Draw the figure of a study into its file.

    Raises:
        OSError: It cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        image = png(criteria(study))
    with replaced(study.figure) as file:
        file.write(image)


def criteria(study: Study) -> Figure:
    """Nats over the dense model of each criterion, pruned and reconstructed, and the spread of both."""
    off = study.worst if _is_far(study) else None
    drawn = study if off is None else study.without(off)
    pairs = zip(study.nats("pruned"), study.nats("reconstructed"), strict=True)
    rows = [(name, dict(zip(STATES, pair, strict=True))) for name, pair in zip(study.runs, pairs, strict=True)]
    rows.sort(key=lambda named: (math.isnan(named[1]["pruned"]), named[1]["pruned"]))
    figure = Figure((WIDTH, 1.5 + ROW * (len(rows) + 2.6)), layout="constrained")
    axes = figure.add_subplot()
    _limit(axes, [*drawn.nats("pruned"), *drawn.nats("reconstructed")])
    axes.axvline(0, color=DENSE, linewidth=1.5, zorder=1)
    for row, (name, nats) in enumerate(rows):
        (_write_run if name == off else _draw_run)(axes, row, nats)
    axes.axhline(len(rows) - 0.3, color=GRID, linewidth=1)
    places = {state: len(rows) + 0.6 + 1.1 * index for index, state in enumerate(STATES)}
    for state, place in places.items():
        _draw_spread(axes, place, drawn.nats(state), COLORS[state])
    labels = [name if name == off else _label(name, nats) for name, nats in rows]
    labels += [f"spread, {state}" + ("" if off is None else f"\nwithout {off}") for state in STATES]
    axes.set_yticks([*range(len(rows)), *places.values()], [_drawable(label) for label in labels])
    axes.set(ylim=(len(rows) + 2.2, -0.7), xlabel="nats over the dense model (lower is better)")
    _finish(axes)
    about = textwrap.fill(_drawable(study.about), 140)
    figure.suptitle(about, x=0.01, ha="left", color=MUTED, fontsize=STYLE["font.size"])
    return figure


def _is_far(study: Study) -> bool:
    """Whether the worst criterion is so far from the others that these could not be told apart at its scale."""
    *_, second, worst = sorted(math.inf if math.isnan(nats) else nats for nats in study.nats("pruned"))
    return len(study.runs) > 2 and worst > FAR * second


def _finish(axes: Axes) -> None:
    """Grid, labels and legend."""
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    dots = [Line2D([], [], linestyle="", color=color, label=state, **DOT) for state, color in COLORS.items()]
    legend(axes, [Line2D([], [], color=DENSE, linewidth=1.5, label="dense"), *dots])


def _limit(axes: Axes, nats: Sequence[float]) -> None:
    """Limits of the x axis: the dense model, all values, and room for a number on both sides."""
    known = [0.0, *(value for value in nats if not math.isnan(value))]
    room = 0.08 * (max(known) - min(known) or 1)
    axes.set_xlim(min(known) - room, max(known) + room)


def _label(name: str, nats: Mapping[str, float]) -> str:
    """Name of a row, and which of its models broke: those have no dot."""
    broken = [state for state, value in nats.items() if math.isnan(value)]
    return f"{name} ({', '.join(broken)}: not finite)" if broken else name


def _drawable(text: str) -> str:
    """Text as matplotlib takes it: names of folders need not be UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _draw_run(axes: Axes, row: int, nats: Mapping[str, float]) -> None:
    """A row from the pruned to the reconstructed model; the smaller number to the left, the larger to the right."""
    worse = nats["reconstructed"] > nats["pruned"]
    axes.plot(list(nats.values()), [row, row], color=WORSE if worse else BETTER, linewidth=6, zorder=1.5)
    for state, is_right in (("pruned", not worse), ("reconstructed", worse)):
        value, color = nats[state], COLORS[state]
        if not math.isnan(value):
            axes.plot(value, row, color=color, **DOT)
            offset, align = ((9, 0), "left") if is_right else ((-9, 0), "right")
            axes.annotate(as_nats(value), (value, row), offset, color=color, ha=align, va="center", **TEXT)


def _write_run(axes: Axes, row: int, nats: Mapping[str, float]) -> None:
    """A row that is off the scale, as text at the right edge."""
    text = ", ".join(f"{state} {as_nats(value)}" for state, value in nats.items())
    edge = axes.get_xlim()[1]
    axes.annotate(f"off the scale: {text} \u25b8", (edge, row), (-4, 0), color=MUTED, ha="right", va="center", **TEXT)


def _draw_spread(axes: Axes, place: float, nats: Sequence[float], color: str) -> None:
    """A bracket over the values of a state, with its length and their standard deviation above it."""
    spread = Spread.of(nats)
    if math.isnan(spread.range):
        axes.annotate("not finite", (0, place), (4, 0), color=color, ha="left", va="center", **TEXT)
        return
    text = f"range {as_nats(spread.range)}, standard deviation {as_nats(spread.deviation)}"
    low, high = min(nats), max(nats)
    axes.plot([low, high], [place, place], "|-", color=color, linewidth=1.5, markersize=8, markeredgewidth=1.5)
    end, align = (low, "left") if low + high < sum(axes.get_xlim()) else (high, "right")
    axes.annotate(text, (end, place), (0, 5), color=color, ha=align, va="bottom", **TEXT)
