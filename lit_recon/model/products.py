"""The products that a layer makes with its matrices, observed where torch makes them; which matrices share an input.

Products are observed by a torch.overrides.TorchFunctionMode, not in a module's forward hook: fused experts have no
module of their own, and a layer may use a weight in ways that its module does not know.

Shapes: E experts (1 for a plain matrix), O outputs, I inputs, N rows.
"""

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lit_recon.model.matrices import LayerMatrices, Matrix

# How a product reads its operands: the position of the inputs among the arguments (the weight comes next), and the
# dimension of the weight that is summed over.
_PRODUCTS = {
    "linear": (0, -1),
    "matmul": (0, -2),
    "__matmul__": (0, -2),
    "mm": (0, -2),
    "bmm": (0, -2),
    "addmm": (1, -2),
    "baddbmm": (1, -2),
    "grouped_mm": (0, -2),
    "_grouped_mm": (0, -2),
    "grouped_mm_fallback": (0, -2),
}
# Curves that a layer bends a parameter by before it uses it (rates of decay, gates): no matrix is used so.
_CURVES = {"exp", "exp_", "expm1", "log", "sigmoid", "softplus", "tanh"}
_CASTS = {"float", "to", "type", "double", "half", "bfloat16"}
# Products, and other ways to use a weight, whose operands are not read.
_OTHER_USES = {"einsum", "tensordot", "conv1d", "conv2d", "conv3d", "embedding", "bilinear", "inner", "outer"}


_ENTRY = re.compile(r"(\.\d+\..*)\.\d+(?=\.)")  # in a name, the entry of a list in a layer
_REMEMBERED = 8  # inputs back that a matrix may share


@dataclass(frozen=True)
class Product:
    """One multiplication of some inputs by a matrix, or by one expert of it.

    Attributes:
        matrix: The matrix.
        inputs: What it is multiplied by, (..., I); the caller's own tensor where all rows go to one expert.
        expert: Index of the expert; 0 for a plain matrix.
        input_dim: Which of the last two dimensions of the matrix's weight was summed over.
    """

    matrix: Matrix
    inputs: Tensor
    expert: int
    input_dim: int

    @property
    def rows_NI(self) -> Tensor:
        """The inputs as rows; for an expert those that were meant for it: some layers give it zeros for all others."""
        rows_NI = self.inputs.flatten(0, -2)
        return rows_NI if self.matrix.experts == 1 else rows_NI[rows_NI.any(1)]


class _ProductMode(TorchFunctionMode):
    """Sees every product of torch and reports those by one of some matrices.

    Args:
        matrices: The matrices.
        note: Is called with each product.
        note_other: Is called with a matrix that is used in a way of which the inputs are not known.
        note_curve: Is called with a parameter that is bent by a curve, itself or in another dtype.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        note: Callable[[Product], None],
        note_other: Callable[[Matrix], None] | None = None,
        note_curve: Callable[[Matrix], None] | None = None,
    ) -> None:
        super().__init__()
        # By address and not by storage: the weights of a mapped checkpoint file share one storage.
        self.slices = {
            matrix.weight.data_ptr() + expert * matrix.slice_bytes: (matrix, expert)
            for matrix in matrices
            for expert in range(matrix.experts)
        }
        self.note, self.note_other, self.note_curve = note, note_other, note_curve
        self._cast: list[tuple[Tensor, Matrix]] = []  # copies in other dtypes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        operands = _PRODUCTS.get(name)
        if operands and len(args) > operands[0] + 1 and isinstance(args[operands[0] + 1], Tensor):
            position, summed = operands
            used = args[position + 1]
            matrix, expert = self.slices.get(used.data_ptr(), (None, 0))
            if matrix is not None and used.numel() * used.element_size() >= matrix.slice_bytes:
                for product in _products(matrix, expert, args[position], used, summed, kwargs.get("offs")):
                    self.note(product)
        elif self.note_other and name in _OTHER_USES:
            for used in tree_leaves((args, kwargs)):
                if isinstance(used, Tensor) and used.data_ptr() in self.slices:
                    self.note_other(self.slices[used.data_ptr()][0])
        result = func(*args, **kwargs)
        if self.note_curve and name in _CASTS | _CURVES and args and isinstance(args[0], Tensor):
            cast = next((matrix for copy, matrix in self._cast if copy is args[0]), None)
            matrix = cast or self.slices.get(args[0].data_ptr(), (None, 0))[0]
            if matrix is not None and name in _CURVES:
                self.note_curve(matrix)
            elif matrix is not None:
                self._cast = [*self._cast[-_REMEMBERED:], (result, matrix)]
        return result


def _products(
    matrix: Matrix, expert: int, inputs: Tensor, used: Tensor, summed: int, ends: Tensor | None
) -> Iterator[Product]:
    """One product per expert, of a weight used as it is, sliced, or transposed.

    Args:
        matrix: The matrix.
        expert: The expert at whose weights `used` starts.
        inputs: Its inputs: (..., I) for one expert; (E, N, I), or rows sorted by expert, for all of them.
        used: The weight, or a view of it, as it stands in the product.
        summed: The dimension of `used` that is summed over.
        ends: For sorted rows: where each expert's rows end.
    """
    strides = matrix.weight.stride()[-2:]
    # A matrix of one column or row has equal strides; then the layout that is known otherwise must do.
    input_dim = matrix.input_dim if strides[0] == strides[1] else strides.index(used.stride(summed))
    assert input_dim is not None, f"{matrix.name}: cannot tell its inputs from its outputs"
    if used.dim() < 3:
        yield Product(matrix, inputs, expert, input_dim)
    elif ends is None:
        for index, inputs_NI in enumerate(inputs):
            yield Product(matrix, inputs_NI, index, input_dim)
    else:
        stops = ends.tolist()
        for index, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
            if stop > start:
                yield Product(matrix, inputs[start:stop], index, input_dim)


@contextmanager
def observing_products(matrices: Sequence[Matrix], note: Callable[[Product], None]) -> Iterator[None]:
    """A context in which `note` is called with every product by one of `matrices`."""
    with _ProductMode(matrices, note):
        yield


class SharedInputs:
    """Which matrices have the same input, such as q, k and v: the first of them that is used leads the others."""

    def __init__(self) -> None:
        self._by_name: dict[str, str] = {}
        self._recent: list[tuple[weakref.ref, str]] = []

    def leader_of(self, product: Product) -> str:
        """Name of the matrix that leads the one of this product; its own where it leads."""
        name = product.matrix.name
        leader = next((other for inputs, other in self._recent if inputs() is product.inputs), name)
        if leader == name and product.matrix.experts == 1:
            self._recent = [*self._recent[-_REMEMBERED:], (weakref.ref(product.inputs), name)]
        return self._by_name.setdefault(name, leader)

    def led(self, leader: str) -> set[str]:
        """Names of all matrices with the input of `leader`."""
        return {name for name, other in self._by_name.items() if other == leader}

    def __getitem__(self, name: str) -> str:
        """Name of the matrix that leads another; its own where it leads or was never used."""
        return self._by_name.get(name, name)


@torch.no_grad()
def learn_input_dims(matrices: LayerMatrices, run: Callable[[], Any]) -> LayerMatrices:
    """The matrices with what a pass shows of how each is used; without parameters that it shows to be none.

    What no product uses is no matrix in this model if it is no larger than a vector (weights of a norm for each head, a
    bias for each expert), is a depthwise convolution, is bent by a curve (rates of decay, such as exp(A_log)), or is
    the weight of an ordinary module (attention to an encoder that is not there), but not of an expert, which may have
    seen no token. How anything else is used is not known.

    Args:
        matrices: As their modules' kinds tell, by layer.
        run: Makes a pass in which the matrices are used.
    """
    seen: dict[str, int] = {}
    used_otherwise: set[str] = set()
    bent: set[str] = set()

    def note(product: Product) -> None:
        seen[product.matrix.name] = product.input_dim

    found = [matrix for layer in matrices for matrix in layer]
    with _ProductMode(
        found,
        note,
        lambda matrix: used_otherwise.add(matrix.name),
        lambda matrix: bent.add(matrix.name),
    ):
        run()
    lists = {_ENTRY.sub(r"\1.*", name) for name in seen}  # of experts, of which some were given tokens

    def is_matrix(matrix: Matrix, vector: int) -> bool:
        if _ENTRY.sub(r"\1.*", matrix.name) in lists:
            return True
        if matrix.name in bent:
            return False
        if matrix.weight.dim() > 2 and 1 in matrix.weight.shape[1:]:  # depthwise: a few numbers for each channel
            return False
        is_plain = matrix.weight.dim() == 2 and matrix.input_dim is not None  # its product would have been seen
        return matrix.name in used_otherwise or (not is_plain and matrix.weight.numel() > vector)

    def learnt(matrix: Matrix) -> Matrix:
        # Experts in modules of their own may have seen no token; their module's kind decides then. Fused ones see some,
        # or they are used in a way that cannot be observed.
        known = None if matrix.weight.dim() == 3 else matrix.input_dim
        return replace(matrix, input_dim=seen.get(matrix.name, known))

    vectors = [max((max(matrix.weight.shape) for matrix in layer), default=0) for layer in matrices]
    pairs = zip(matrices, vectors, strict=True)
    return [tuple(learnt(matrix) for matrix in layer if is_matrix(matrix, vector)) for layer, vector in pairs]
