"""The figure of hidden states over depth: how far the checkpoint's are from the dense model's after each layer.

Errors are in units of the median energy of the dense model's states, as evaluations.json has them. In the colours of
figures.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lit_recon.report.figures import RECONSTRUCTED, WIDTH, legend, make_logarithmic
from lit_recon.report.run_files import finite_or_nan


def hidden_errors(layers: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Error of the hidden states after each layer, mean over tokens and typical token; None without layers.

    Args:
        layers: Entries with "layer", "mean" and "typical".
    """
    if not layers:
        return None
    figure = Figure((WIDTH, 3.2), layout="constrained")
    axes = figure.add_subplot()
    depth = [finite_or_nan(layer["layer"]) for layer in layers]
    size = 5.5 if len(layers) <= 40 else 3.5
    for key, line, label in (("mean", "o-", "mean over tokens"), ("typical", "o:", "typical token")):
        values = [finite_or_nan(layer.get(key)) for layer in layers]
        face = RECONSTRUCTED if key == "mean" else "white"
        axes.plot(depth, values, line, color=RECONSTRUCTED, markerfacecolor=face, markersize=size, label=label)
    make_logarithmic(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.set(xlabel="layer", ylabel="error of hidden states\n(median energy, dense = 1)")
    legend(axes, axes.lines)
    return figure
