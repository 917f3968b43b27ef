"""The figures of a run: perplexity, error over depth, learning curves, time and memory.

Drawn from the files of the run (run_files.py), so that they can be drawn again at any time. One colour means one thing
in all of them: grey is the dense model, orange the pruned model, blue the reconstructed model (Okabe and Ito's palette,
safe for colour-blind readers). No pyplot: no window, no global state.
"""

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ValueError:  # of a backend that does not exist, in an environment variable; what is drawn here needs none
    os.environ.pop("MPLBACKEND", None)
    import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from PIL import Image

from lit_recon.report.run_files import Curve, finite_or_nan, has_units, measure, read_curves, read_results
from lit_recon.system.atomic_files import make_folder, replaced
from lit_recon.system.units import duration

DENSE, PRUNED, RECONSTRUCTED = "#5b6470", "#d55e00", "#0072b2"
TRAINING, INK, MUTED, AXIS = "#5aa2d0", "#1f2933", "#5b6470", "#b6bdc7"
GRID, BAND, REFUSED = "#e3e7ec", "#f6f7f9", "#fbe3d3"
BETTER, WORSE = "#a9cfe6", "#f3c9a8"  # from the pruned to the reconstructed model
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same look on every machine
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # names are names, also with a dollar sign
    "axes.labelcolor": INK,
    "axes.edgecolor": AXIS,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "xtick.color": AXIS,
    "ytick.color": AXIS,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
}
WIDTH, DPI = 10.0, 150  # inches, dots per inch
IN_UNITS = (None, "mean_squared", "huber", "balanced")  # losses in the unit of the errors; None: the default


def write_figures(
    run: Path, out: Path | None = None, more: Mapping[str, Callable[[], Figure | None]] | None = None
) -> list[Path]:
    """Draw the figures of a run into its `figures` folder.

    Args:
        run: The run's folder.
        out: The folder whose `figures` they go to, where it is not the run's.
        more: Other figures by name, drawn in the same style.

    Returns:
        The files written, in the order in which they are read. The learning curves are left out if the run has none.

    Raises:
        ValueError: The folder holds no run.
    """
    results, curves = read_results(run), read_curves(run)
    drawn: dict[str, Callable[[], Figure | None]] = {
        "perplexity": lambda: perplexity(results["perplexity"], results["gap_recovered"]),
        "error_over_depth": lambda: error_over_depth(results["windows"]),
        "learning_curves": lambda: learning_curves(results["windows"], curves, results["recipe"].get("loss")),
        "time": lambda: time_per_phase(results["seconds"]),
        "memory": lambda: peak_memory(results),
    }
    return save_figures(drawn | dict(more or {}), run if out is None else out)


def save_figures(drawn: Mapping[str, Callable[[], Figure | None]], out: Path) -> list[Path]:
    """Draw figures into the `figures` folder of a folder, all in one style; the files written.

    Args:
        drawn: By name; None where there is nothing to draw.
        out: The folder.
    """
    with matplotlib.rc_context(STYLE):
        figures = {name: draw() for name, draw in drawn.items()}
        images = {name: png(figure) for name, figure in figures.items() if figure is not None}
    folder = out / "figures"
    make_folder(folder)
    paths = {folder / f"{name}.png": image for name, image in images.items()}
    for path, image in paths.items():
        with replaced(path) as file:
            file.write(image)
    return list(paths)


def png(figure: Figure) -> bytes:
    """PNG of a figure, drawn in memory: an interrupt leaves no partial file. 256 colours make it a third as large."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def perplexity(perplexities: Mapping[str, float], gap_recovered: float | None) -> Figure:
    """Perplexity on a line: the gap between the dense and the pruned model, and the reconstructed model in it.

    Args:
        perplexities: "dense", "pruned" and "reconstructed".
        gap_recovered: Share of the gap that reconstruction recovered; written into the gap if there is room for it.
    """
    figure = Figure((WIDTH, 1.5), layout="constrained")
    axes = figure.add_subplot()
    values = {name: finite_or_nan(perplexities[name]) for name in ("dense", "pruned", "reconstructed")}
    colors = {"dense": DENSE, "pruned": PRUNED, "reconstructed": RECONSTRUCTED}
    share = finite_or_nan(gap_recovered)
    for end, color in (("dense", "#dfe3e8"), ("reconstructed", WORSE if share < 0 else BETTER)):
        axes.plot([values["pruned"], values[end]], [0, 0], color=color, linewidth=7, solid_capstyle="round")
    ranked = sorted((value, name) for name, value in values.items() if not math.isnan(value))
    # label of the lowest to its left, of the highest to its right, of the middle above it: labels never meet
    for rank, (value, name) in enumerate(ranked):
        offset, align = [((-11, 0), "right"), ((0, 12), "center"), ((11, 0), "left")][rank]
        axes.plot(value, 0, "o", color=colors[name], markersize=12, markeredgecolor="white", markeredgewidth=1.5)
        style: Any = {"color": colors[name], "weight": "bold", "ha": align, "va": "bottom" if rank == 1 else "center"}
        axes.annotate(f"{name} {value:,.2f}", (value, 0), xytext=offset, textcoords="offset points", **style)
    middle = (values["pruned"] + values["reconstructed"]) / 2
    if ranked and 0 < 20 * ranked[0][0] < ranked[-1][0]:
        make_logarithmic(axes.xaxis)
        middle = math.sqrt(values["pruned"] * values["reconstructed"])
    if share >= 0.25:
        axes.text(middle, -0.45, f"{share:.1%} of the gap recovered", ha="center", va="top", color=RECONSTRUCTED)
    axes.set(ylim=(-1.6, 1.6), yticks=[], xlabel="perplexity (lower is better)")
    axes.spines["left"].set_visible(False)
    axes.grid(visible=True, axis="x")
    return figure


def error_over_depth(windows: Sequence[Mapping[str, Any]]) -> Figure:
    """Errors over depth: each window of results.json before and after reconstruction, and the share that is left.

    Lines are means over tokens, dots the typical (median) token's; runs until version 0.4 have none.
    """
    figure = Figure((WIDTH, 4.9), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    depth = range(len(windows))
    held_out, calibration, typical = (
        {when: [finite_or_nan(window.get(f"{part}_{when}")) for window in windows] for when in ("before", "after")}
        for part in ("held_out", "relative_error", "typical")
    )
    upper.vlines(depth, held_out["after"], held_out["before"], color="#c9d0d8", linewidth=1.2, zorder=1)
    size = 5.5 if len(windows) <= 40 else 3.5
    for when, color, label in (("before", PRUNED, "pruned"), ("after", RECONSTRUCTED, "reconstructed")):
        upper.plot(depth, held_out[when], "o-", color=color, linewidth=1, markersize=size, label=label)
        if has_units(windows):
            style: Any = {"color": color, "linewidth": 1, "markersize": size, "markerfacecolor": "white"}
            upper.plot(depth, typical[when], "o:", label=f"{label}, typical token", **style)
    make_logarithmic(upper.yaxis)
    in_units = has_units(windows) and measure(windows) == "relative error"
    upper.set_ylabel(f"held-out {measure(windows)}" + ("\n(median dense update = 1)" if in_units else ""))
    lower.axhline(1, color=PRUNED, linewidth=1.2, label="pruned")
    shares: list[tuple[dict[str, list[float]], str, str, str]] = [
        (held_out, "held-out", "o-", RECONSTRUCTED),
        (typical, "held-out, typical token", "o:", RECONSTRUCTED),
        (calibration, "calibration", "--", TRAINING),
    ]
    for errors, label, line, color in shares:
        left = [after / before if before else math.nan for before, after in zip(*errors.values(), strict=True)]
        if errors is not typical or has_units(windows):
            face = "white" if errors is typical else color
            style = {"color": color, "linewidth": 1.2, "markersize": size, "markerfacecolor": face}
            lower.plot(depth, left, line, label=label, **style)
    lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lower.set(ylim=(0, None), ylabel="error left\n(share of pruned)")
    _depth_axis(lower, windows)
    hollow: Any = {"color": MUTED, "markersize": size, "markerfacecolor": "white", "label": "typical token"}
    both = [Line2D([], [], linestyle=":", linewidth=1, marker="o", **hollow)] if has_units(windows) else []
    lines = [line for line in upper.lines if line.get_linestyle() == "-"]
    legend(upper, [*lines, *both, *_shade_refused(upper, windows)])
    legend(lower, lower.lines)
    _shade_refused(lower, windows)
    return figure


def learning_curves(
    windows: Sequence[Mapping[str, Any]], curves: Mapping[str, Curve], loss: str | None = None
) -> Figure | None:
    """Learning curves: training and held-out loss, a column per window, its optimizer steps from left to right.

    A shared logarithmic axis keeps windows comparable. A column ends with the last step of its window; a curve that
    starts inside its column was first logged there.

    Args:
        windows: The entries of `windows` in results.json, in the order of depth.
        curves: All scalars of the run by tag.
        loss: Name of the loss; None: the default.

    Returns:
        The figure, or None if no window has a curve.
    """
    names = ("loss/train", "loss/held_out")
    if not any(f"{window['name']}/{name}" in curves for window in windows for name in names):
        return None
    figure = Figure((WIDTH, 3.9), layout="constrained")
    axes = figure.add_subplot()
    for index, window in enumerate(windows):
        if index % 2:
            axes.axvspan(index - 0.5, index + 0.5, color=BAND, linewidth=0, zorder=0)
        # a second attempt logs the same steps again: the later one counts
        train, held_out = (sorted(dict(curves.get(f"{window['name']}/{name}", [])).items()) for name in names)
        steps = [step for step, _ in train + held_out]
        span = max(window["steps"], max(steps) - min(steps), 1) if steps else 1
        for curve, color, crowd in ((train, TRAINING, 1), (held_out, RECONSTRUCTED, 400 / len(windows))):
            x = [index + 0.4 - 0.8 * (max(steps) - step) / span for step, _ in curve]
            y = [finite_or_nan(value) for _, value in curve]
            axes.plot(x, y, color=color, linewidth=1.4, markersize=3.5, marker="o" if len(curve) <= crowd else "")
    make_logarithmic(axes.yaxis)
    unit = "median dense update" if has_units(windows) else "variance of the target"
    in_units = measure(windows) == "relative error" and (loss in IN_UNITS or not has_units(windows))
    axes.set_ylabel(f"loss ({unit} = 1)" if in_units else "loss")
    without = sum(not any(f"{window['name']}/{name}" in curves for name in names) for window in windows)
    remark = f"; of {len(windows) - without} of {len(windows)} windows" if without else ""
    _depth_axis(axes, windows, f"each column: its optimizer steps, left to right{remark}")
    lines = [
        Line2D([], [], color=TRAINING, linewidth=1.4, label="training batches"),
        Line2D([], [], color=RECONSTRUCTED, linewidth=1.4, marker="o", markersize=3.5, label="held-out samples"),
    ]
    legend(axes, [*lines, *_shade_refused(axes, windows)])
    return figure


def time_per_phase(seconds: Mapping[str, float]) -> Figure:
    """Wall time per phase, in the order of the run; what is in "total" but in no phase is called "other"."""
    total = seconds["total"]
    phases = {phase: value for phase, value in seconds.items() if phase != "total"}
    phases["other"] = max(0.0, total - sum(phases.values()))
    unit, length = ("hours", 3600) if total > 4 * 3600 else ("minutes", 60) if total > 600 else ("seconds", 1)
    figure = Figure((WIDTH, 0.65 + 0.27 * len(phases)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(list(phases), [value / length for value in phases.values()], height=0.66, color=RECONSTRUCTED)
    labels = [f"{duration(value)}   {value / total if total else 0:.0%}" for value in phases.values()]
    axes.bar_label(bars, labels, padding=6, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_xlabel(f"wall time ({unit})")
    return figure


def peak_memory(results: Mapping[str, Any]) -> Figure | None:
    """Peak memory of each phase, the walk and the whole run, next to what was predicted; None where none is known."""
    predicted = results.get("predicted") or {}
    rows = {
        **(results.get("phase_peak_memory_bytes") or {}),  # unknown of earlier versions, and on some systems
        "walk": results.get("walk_peak_memory_bytes"),
        "walk, predicted": predicted.get("walk_peak_memory_bytes"),
        "walk, the CPU's": results.get("walk_peak_host_bytes"),  # of a run on a GPU
        "walk, the CPU's, predicted": predicted.get("walk_peak_host_bytes"),
        "whole run": results["peak_memory_bytes"],
        "whole run, predicted": predicted.get("peak_memory_bytes"),
    }
    sizes = {name: finite_or_nan(size) / 1e9 for name, size in rows.items()}
    known = {name: size for name, size in sizes.items() if not math.isnan(size)}
    if not known:
        return None
    figure = Figure((WIDTH, 0.65 + 0.27 * len(known)), layout="constrained")
    axes = figure.add_subplot()
    colors = [AXIS if name.endswith("predicted") else RECONSTRUCTED for name in known]
    bars = axes.barh(list(known), list(known.values()), height=0.66, color=colors)
    axes.bar_label(bars, [f"{size:.2f} GB" for size in known.values()], padding=6, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("peak memory (GB)")
    return figure


def make_logarithmic(axis: XAxis | YAxis) -> None:
    """Give an axis a logarithmic scale with plain numbers, also below one decade; not if no value is positive."""
    if not math.isfinite(axis.get_minpos()):
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    per_decade = [(4, [1]), (2, [1, 3]), (0.6, [1, 2, 5]), (0, range(1, 10))]
    axis.set_major_locator(LogLocator(subs=next(subs for decades, subs in per_decade if high > low * 10**decades)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def _depth_axis(axes: Axes, windows: Sequence[Mapping[str, Any]], remark: str = "") -> None:
    """Label an x axis with the windows: by name where there is room, else by number."""
    remark = f" ({remark})" if remark else ""
    axes.set_xlim(-0.5, len(windows) - 0.5)
    if len(windows) <= 8:
        axes.set_xticks(range(len(windows)), [window["name"] for window in windows])
        axes.set_xlabel(f"window{remark}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        axes.set_xlabel(f"window, from {windows[0]['name']} to {windows[-1]['name']}{remark}")


def _shade_refused(axes: Axes, windows: Sequence[Mapping[str, Any]]) -> list[Patch]:
    """Shade the windows that kept their pruned weights.

    Returns:
        The entry for the legend, none if all windows were accepted.
    """
    refused = [index for index, window in enumerate(windows) if not window["accepted"]]
    for index in refused:
        axes.axvspan(index - 0.5, index + 0.5, color=REFUSED, linewidth=0, zorder=0.5)
    return [Patch(color=REFUSED, label="not accepted, pruned weights kept")] if refused else []


def legend(axes: Axes, handles: Sequence[Line2D | Patch]) -> None:
    """Put a legend in one line above the axes, where it hides nothing."""
    spacing = {"borderaxespad": 0.2, "borderpad": 0.2, "handlelength": 1.6, "columnspacing": 1.8}
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), **spacing)
