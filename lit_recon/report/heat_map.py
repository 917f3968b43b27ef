"""The heat map of a run: the sparsity of every matrix, kinds from top to bottom, layers from left to right.

One hue from light to dark, so that it can be read in grey and by colour-blind readers; where all matrices are equally
sparse it is one colour. Of experts, the mean of a layer's.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lit_recon.report.figures import INK, MUTED, WIDTH

FEW = 16  # layers up to which the numbers stand in the cells
NARROW = 0.05  # range of sparsities below which colours would tell differences that do not matter


def kind_of(name: str) -> str:
    """Kind of a matrix: matrices of the same name in different layers and experts are of one kind."""
    kind = re.sub(r"^.*?\.\d+\.", "", name).removesuffix(".weight")
    return re.sub(r"\.\d+\.", ".*.", kind)


def sparsity_by_layer(by_matrix: Mapping[str, float]) -> Figure | None:
    """Sparsity per kind and layer as a heat map; None if no name has a layer's number.

    Args:
        by_matrix: Sparsity by the name of the matrix, such as "model.layers.3.mlp.up_proj.weight".
    """
    cells: dict[tuple[str, int], list[float]] = defaultdict(list)
    for name, sparsity in by_matrix.items():
        if number := re.search(r"\.(\d{1,5})\.", name):
            cells[kind_of(name), int(number[1])].append(sparsity)
    if not cells:
        return None
    kinds, layers = list(dict.fromkeys(kind for kind, _ in cells)), sorted({layer for _, layer in cells})
    values = np.full((len(kinds), len(layers)), math.nan)
    for (kind, layer), found in cells.items():
        values[kinds.index(kind), layers.index(layer)] = np.mean(found)
    figure = Figure((WIDTH, 1.1 + 0.3 * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if high - low < NARROW:
        low, high = (low + high) / 2 - NARROW / 4, (low + high) / 2 + NARROW * 3 / 4  # light, so that text stands out
    image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=low - 0.15 * (high - low), vmax=high)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1, decimals=0 if high - low > 0.1 else 1), pad=0.01)
    bar.set_label("sparsity", color=MUTED)
    axes.set_yticks(range(len(kinds)), [kind.encode(errors="backslashreplace").decode() for kind in kinds])
    axes.tick_params(axis="both", length=0, labelcolor=INK)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    if len(layers) <= FEW:
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        for row, column in np.argwhere(~np.isnan(values)):
            color = "white" if values[row, column] > low + 0.6 * (high - low) else INK
            text = f"{values[row, column]:.0%}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        axes.xaxis.set_major_formatter(lambda at, _: str(layers[round(at)]) if 0 <= round(at) < len(layers) else "")
    axes.set_xlabel("layer")
    return figure
