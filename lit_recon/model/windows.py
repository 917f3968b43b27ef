"""Windows: the parts of a model that are reconstructed at once.

    tokens -> embeddings -> |  layer 0  |  layer 1  |  layer 2  |  layer 3  |  layer 4  | -> head
    matrix                  |q k v o g..|q k v o g..|     each matrix against its own dense product
    half                    | att | mlp | att | mlp | att | mlp | att | mlp | att | mlp |
    block                   |  block_00 |  block_01 |  block_02 |  block_03 |  block_04 |
    blocks, size 2          |     blocks_00_01      |     blocks_02_03      |  block_04 |    the last may be shorter
    blocks, size 3 stride 2 |           blocks_00_02            |    kept: layers 0 and 1
                                                    |           blocks_02_04            |
    model                   |                          model                            |

Most windows map the hidden states at their start to those at their end and follow each other without a gap. The halves
of a parallel layer (halves.py) start both from its input. Matrices have inputs of their own, which are observed while
their layer, still dense, runs.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lit_recon.model.decoder import LayerCall, call_layer
from lit_recon.model.halves import SIDES, Split, run_half
from lit_recon.model.head import Head
from lit_recon.model.matrices import Matrix


class WindowKind(str, Enum):
    """What is reconstructed at once, from small to large."""

    MATRIX = "matrix"
    HALF = "half"
    BLOCK = "block"
    BLOCKS = "blocks"
    MODEL = "model"

    def __str__(self) -> str:
        """The setting's value."""
        return self.value

    @property
    def smaller(self) -> list["WindowKind"]:
        """The kinds of windows that are smaller."""
        kinds = list(WindowKind)
        return kinds[: kinds.index(self)]


class Window(nn.Module):
    """Consecutive layers of a model, called one after the other.

    Attributes:
        name: Unique in a partition, and sorting in the order of the walk.
        indices: Indices of its layers in the model.
        num_kept: How many of its layers, from the first, keep what they learn here; the others are in the next window
            too.
        parallel_half: For the halves of a parallel layer "first" or "second"; both start from the layer's input.
        head: Makes logits (B, T, V) of the outputs where the loss is on them; None where it is on the outputs.
        measure: What its errors are.
        is_chosen: Whether it is reconstructed; else it is pruned only.
    """

    measure = "relative error"
    is_chosen = True

    def __init__(
        self,
        name: str,
        layers: Sequence[nn.Module],
        *,
        first: int,
        matrices: Sequence[Matrix],
        num_kept: int | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.layers = nn.ModuleList(layers)
        self.indices = range(first, first + len(layers))
        self.num_kept = len(layers) if num_kept is None else num_kept
        self.parallel_half: str | None = None
        self.head: Head | None = None
        self._matrices = tuple(matrices)

    def forward(self, hidden_BTD: Tensor, calls: Sequence[LayerCall], layers: slice = slice(None)) -> Tensor:
        """Hidden states at the end of the window, (B, T, D), given those at its start.

        Args:
            hidden_BTD: Hidden states at the window's start, or at the first of `layers`.
            calls: The recorded arguments of every layer of the model, for a batch of this shape.
            layers: Which of the window's layers to run.
        """
        for index, layer in list(zip(self.indices, self.layers, strict=True))[layers]:
            hidden_BTD = call_layer(layer, hidden_BTD, calls[index])
        return hidden_BTD

    def matrices(self) -> Sequence[Matrix]:
        """The window's matrices, named as in the model."""
        return self._matrices

    def kept_matrices(self) -> list[Matrix]:
        """Those of the layers that are kept."""
        dropped = {id(parameter) for parameter in self.shared_with_next()}
        return [matrix for matrix in self._matrices if id(matrix.weight) not in dropped]

    def owners(self) -> Sequence[nn.Module]:
        """The modules that hold the window's parameters: its layers."""
        return list(self.layers)

    def own_parameters(self) -> list[nn.Parameter]:
        """The window's own parameters, which a module may train."""
        return list(self.parameters())

    def shared_with_next(self) -> list[nn.Parameter]:
        """The parameters that the next window needs as they were: those of the layers that are not kept."""
        return [parameter for layer in self.layers[self.num_kept :] for parameter in layer.parameters()]

    @property
    def has_shared_norms(self) -> bool:
        """Whether the window uses norms that an earlier one has trained."""
        return False

    @contextmanager
    def with_dense_norms(self) -> Iterator[None]:
        """A context in which norms that earlier windows have trained are dense again."""
        yield

    @property
    def enclosing(self) -> "Window":
        """The window between whose ends the chain steps."""
        return self


class DecoderWindow(Window):
    """All layers of a model, trained at once from its embeddings.

    Args:
        layers: The layers.
        matrices: Their matrices.
        checkpoint_layers: Whether backward computes each layer again, so that activations of one are there at once.

    Attributes:
        units: Where the outputs are the states after all layers side by side: the unit of each layer's error, over
            whose root its states are handed out; None where they are the states after the last layer.
    """

    def __init__(self, layers: Sequence[nn.Module], *, matrices: Sequence[Matrix], checkpoint_layers: bool) -> None:
        super().__init__("global", layers, first=0, matrices=matrices)
        self.checkpoint_layers = checkpoint_layers
        self.units: list[float] | None = None

    def forward(self, hidden_BTD: Tensor, calls: Sequence[LayerCall], layers: slice = slice(None)) -> Tensor:
        """Hidden states after the last layer (B, T, D), or after all layers side by side (B, T, L D)."""
        states = []
        for layer, call in list(zip(self.layers, calls, strict=True))[layers]:
            if self.checkpoint_layers and torch.is_grad_enabled():
                hidden_BTD = checkpoint(call_layer, layer, hidden_BTD, call, use_reentrant=False)
            else:
                hidden_BTD = call_layer(layer, hidden_BTD, call)
            if self.units is not None:
                states.append(hidden_BTD)
        return hidden_BTD if self.units is None else side_by_side(states, self.units)


def side_by_side(states: Sequence[Tensor], units: Sequence[float]) -> Tensor:
    """States after L layers (B, T, D) side by side, (B, T, L D), each over the root of its layer's unit.

    A mean over the features of their squared error is a mean over layers of errors in each layer's own unit.
    """
    scaled = [state_BTD.float() / math.sqrt(unit) for state_BTD, unit in zip(states, units, strict=True)]
    return torch.cat(scaled, dim=-1)


class HalfWindow(Window):
    """The attention or the MLP half of one layer.

    Args:
        name: Unique in a partition.
        layer: The layer.
        index: Its index in the model.
        matrices: The matrices of the layer.
        split: How the layer falls into halves.
        side: "attention" or "mlp".
    """

    def __init__(
        self, name: str, layer: nn.Module, *, index: int, matrices: Sequence[Matrix], split: Split, side: str
    ) -> None:
        mine = {id(layer.get_parameter(parameter)) for parameter in split.trained[side]}
        super().__init__(name, [], first=index, matrices=[one for one in matrices if id(one.weight) in mine])
        self.indices, self.num_kept = range(index, index + 1), 1
        self.side, self.split = side, split
        self._layer = (layer,)  # in a tuple, not registered: it holds the other half too
        other = split.children[SIDES[1 - SIDES.index(side)]]
        self.used = nn.ModuleList(child for name, child in layer.named_children() if name not in other)
        self.parallel_half = ("first" if side == "attention" else "second") if split.parallel else None
        # Norms that the first half trains, and that the second one's targets need as they were.
        norms = [layer.get_parameter(name) for name in (split.shared if side == "mlp" else [])]
        self._shared = [(norm, norm.detach().clone()) for norm in norms]

    @property
    def layer(self) -> nn.Module:
        """The layer of which this is a half."""
        return self._layer[0]

    def forward(self, hidden_BTD: Tensor, calls: Sequence[LayerCall], layers: slice = slice(None)) -> Tensor:
        """Hidden states at the end of the half, (B, T, D), given those at its start."""
        if not range(1)[layers]:
            return hidden_BTD
        return run_half(self.layer, self.split, self.side, hidden_BTD, calls[self.indices.start])

    def owners(self) -> Sequence[nn.Module]:
        """The layer, which holds the other half too."""
        return [self.layer]

    def own_parameters(self) -> list[nn.Parameter]:
        """The half's own parameters."""
        return [self.layer.get_parameter(name) for name in self.split.trained[self.side]]

    def shared_with_next(self) -> list[nn.Parameter]:
        """Nothing: the second half is reconstructed on top of the first."""
        return []

    @property
    def has_shared_norms(self) -> bool:
        """Whether the half uses norms that the first one has trained."""
        return bool(self._shared)

    @contextmanager
    def with_dense_norms(self) -> Iterator[None]:
        """A context in which norms that the first half has trained are dense again."""
        changed = [parameter.data for parameter, _ in self._shared]
        for parameter, value in self._shared:
            parameter.data = value.to(parameter)
        try:
            yield
        finally:
            for (parameter, _), value in zip(self._shared, changed, strict=True):
                parameter.data = value


class MatrixWindow(nn.Module):
    """One matrix by itself: its product with inputs of its own, without bias.

    The layer stays dense until all its matrices are done: `open` takes a copy to work on, `install` puts it into the
    layer.

    Args:
        matrix: The matrix, in its layer.
        layer: The window of the whole layer, which its siblings share.
    """

    head: Head | None = None
    measure = "relative error"
    is_chosen = True

    def __init__(self, matrix: Matrix, layer: Window) -> None:
        super().__init__()
        self.matrix = matrix
        self.name_in_layer = next(name for name, one in layer.layers[0].named_parameters() if one is matrix.weight)
        self.name = f"{layer.name}.{self.name_in_layer.removesuffix('.weight')}"
        self.indices = layer.indices
        self._layer = (layer,)  # in a tuple, not registered
        self.weight: nn.Parameter = matrix.weight

    @property
    def enclosing(self) -> Window:
        """The window of the whole layer, over which the chain steps once all its matrices are done."""
        return self._layer[0]

    def open(self) -> None:
        """Work on a copy of the weight from now on."""
        self.weight = nn.Parameter(self.matrix.weight.detach().clone(), requires_grad=False)

    @torch.no_grad()
    def install(self) -> None:
        """Put the copy into the layer."""
        self.matrix.weight.copy_(self.weight)
        self.weight = self.matrix.weight

    def forward(self, inputs_BTI: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        """The products, (B, T, O).

        Args:
            inputs_BTI: What the matrix is multiplied by.
            calls: One call, whose `experts` says which expert each row goes to; empty for a plain matrix.
        """
        (matrix,) = self.matrices()
        weight_EOI = matrix.by_expert(matrix.weight)
        if not calls:
            return functional.linear(inputs_BTI, weight_EOI[0])
        inputs_NI, experts_N = inputs_BTI.flatten(0, 1), calls[0].kwargs["experts"].flatten()
        order_N = experts_N.argsort(stable=True)
        counts = torch.bincount(experts_N, minlength=len(weight_EOI)).tolist()
        by_expert = inputs_NI[order_N].split(counts)
        products_NO = torch.cat([functional.linear(*pair) for pair in zip(by_expert, weight_EOI, strict=True)])
        return products_NO[order_N.argsort()].unflatten(0, inputs_BTI.shape[:2])

    def matrices(self) -> Sequence[Matrix]:
        """The matrix, with the weight that is worked on."""
        return [Matrix(self.matrix.name, self.weight, self.matrix.input_dim)]

    def owners(self) -> Sequence[nn.Module]:
        """This window, which holds the weight that is worked on."""
        return [self]

    def own_parameters(self) -> list[nn.Parameter]:
        """The weight."""
        return [self.weight]


AnyWindow = Window | MatrixWindow


def named_parameters(window: AnyWindow) -> Iterator[tuple[str, nn.Parameter]]:
    """A window's own parameters, each with its name in its layer, such as self_attn.k_proj.weight."""
    if isinstance(window, MatrixWindow):
        yield window.name_in_layer, window.weight
        return
    own = {id(parameter) for parameter in window.own_parameters()}
    for layer in window.owners():
        yield from ((name, parameter) for name, parameter in layer.named_parameters() if id(parameter) in own)


def enclosing_windows(windows: Sequence[AnyWindow]) -> list[Window]:
    """What the chain steps over for some windows, in order: the windows; of single matrices their layers, each once."""
    return list({id(window.enclosing): window.enclosing for window in windows}.values())


def has_parallel_halves(windows: Sequence[AnyWindow]) -> bool:
    """Whether there are halves of parallel layers among some windows."""
    return any(window.parallel_half is not None for window in windows if isinstance(window, Window))
