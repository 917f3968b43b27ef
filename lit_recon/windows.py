"""Windows: the parts of a model that are reconstructed at once.

    tokens -> embeddings -> | layer 0 | layer 1 | layer 2 | layer 3 | layer 4 | -> head
    block                   | block_00| block_01| block_02| block_03| block_04|
    blocks, size 2          |    blocks_00_01   |    blocks_02_03   | block_04|      the last one may be shorter
    model                   |                     model                       |

A window is a module that maps the hidden states at its start to those at its end. Windows follow each other without a
gap, so that one window's output is the next one's input.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_recon.blocks import LayerCall, Matrix, call_layer, decoder_layers, matrices


class Window(nn.Module):
    """Consecutive layers of a model, called one after the other.

    Args:
        name: Unique in a partition, and sorting in the order of the walk.
        layers: The layers of the window.
        first: Index of its first layer in the model.
        prefix: Qualified name of the model's list of layers, for example "model.layers".
    """

    def __init__(self, name: str, layers: Sequence[nn.Module], *, first: int, prefix: str) -> None:
        super().__init__()
        self.name = name
        self.layers = nn.ModuleList(layers)
        self.indices = range(first, first + len(layers))
        self.prefix = prefix

    def forward(self, hidden_BTD: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        """Hidden states at the end of the window, (B, T, D), given those at its start.

        Args:
            hidden_BTD: Hidden states at the window's start.
            calls: The recorded arguments of every layer of the model, for a batch of this shape.
        """
        for index, layer in zip(self.indices, self.layers, strict=True):
            hidden_BTD = call_layer(layer, hidden_BTD, calls[index])
        return hidden_BTD

    def matrices(self) -> list[Matrix]:
        """The window's matrices, named as in the model."""
        return [
            matrix
            for index, layer in zip(self.indices, self.layers, strict=True)
            for matrix in matrices(layer, f"{self.prefix}.{index}")
        ]


def partition(model: PreTrainedModel, *, by: str = "block", size: int = 1) -> list[Window]:
    """Cut a model into windows, in order, so that every layer is in exactly one of them.

    Args:
        model: The model; the windows share its layers.
        by: "block" (one layer each), "blocks" (`size` layers each, the last window may be shorter) or "model".
        size: Layers per window for "blocks".

    Raises:
        ValueError: An unknown kind, a size that is not positive, or a model whose layers cannot be found.
    """
    prefix, layers = decoder_layers(model)
    sizes = {"block": 1, "blocks": size, "model": len(layers)}
    if by not in sizes:
        raise ValueError(f"windows.by={by!r}: expected one of {', '.join(sizes)}.")
    if type(size) is not int or size < 1:
        raise ValueError(f"windows.size={size}: expected at least 1 layer per window.")
    step, digits = sizes[by], max(2, len(str(len(layers) - 1)))
    windows = []
    for first in range(0, len(layers), step):
        members = layers[first : first + step]
        last = first + len(members) - 1
        name = f"block_{first:0{digits}}" if first == last else f"blocks_{first:0{digits}}_{last:0{digits}}"
        windows.append(Window("model" if by == "model" else name, list(members), first=first, prefix=prefix))
    return windows
