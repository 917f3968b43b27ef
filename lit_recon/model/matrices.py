"""The prunable matrices of a layer, and what they are multiplied by.

A matrix is a parameter with two or more dimensions that a layer multiplies its inputs by: the weight of an nn.Linear or
of GPT-2's Conv1D, or one three-dimensional parameter that holds all experts of a mixture. Which products are made is
observed where they are made (torch.overrides.TorchFunctionMode), not in a module's forward hook: fused experts have no
module of their own, and a layer may use a weight in ways that its module does not know.

Not matrices: routers, which stay dense, and the stacked biases of fused experts.

Shapes: E experts (1 for a plain matrix), O outputs, I inputs, N rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

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


@dataclass(frozen=True)
class Matrix:
    """One weight of a layer that its inputs are multiplied by.

    Attributes:
        name: Qualified name in the model, for example "model.layers.3.mlp.up_proj.weight".
        weight: The parameter itself: two dimensions, or three with the experts first.
        input_dim: Which of the last two dimensions of `weight` runs over the inputs: 1 for (O, I), 0 for (I, O); None
            where it is not known how the weight is used.
    """

    name: str
    weight: nn.Parameter
    input_dim: int | None

    @property
    def experts(self) -> int:
        """Number of experts; 1 for a plain matrix."""
        return len(self.weight) if self.weight.dim() == 3 else 1

    @property
    def slice_bytes(self) -> int:
        """Size of one expert's weights."""
        return self.weight.numel() // self.experts * self.weight.element_size()

    def by_expert(self, tensor: Tensor) -> Tensor:
        """`tensor` (shaped like the weight) as a view (E, O, I)."""
        tensor_EXX = tensor if tensor.dim() == 3 else tensor[None]
        return tensor_EXX.mT if self.input_dim == 0 else tensor_EXX

    def as_weight(self, tensor_EOI: Tensor) -> Tensor:
        """`tensor_EOI` in the shape of the weight: the inverse of `by_expert`."""
        tensor_EXX = tensor_EOI.mT if self.input_dim == 0 else tensor_EOI
        return tensor_EXX if self.weight.dim() == 3 else tensor_EXX[0]

    def label(self, expert: int) -> str:
        """Name of one expert's slice; of a plain matrix, its name."""
        return f"{self.name}[{expert}]" if self.weight.dim() == 3 else self.name


def matrices(layer: nn.Module, prefix: str) -> list[Matrix]:
    """The matrices of a layer, in the order of its parameters, named below `prefix`; without routers."""
    excluded = {id(parameter) for parameter in (*routers(layer), *_stacked_biases(layer))}
    found = []
    for path, owner in layer.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if parameter.dim() >= 2 and id(parameter) not in excluded:
                name = ".".join(filter(None, (prefix, path, leaf)))
                found.append(Matrix(name, parameter, _input_dim(owner, leaf, parameter)))
    return found


def _input_dim(owner: nn.Module, leaf: str, parameter: nn.Parameter) -> int | None:
    """What was learnt from a pass (`learn_input_dims`), or what the module's kind tells."""
    if hasattr(parameter, "input_dim"):
        return parameter.input_dim
    if leaf == "weight" and parameter.dim() == 2:
        return 1 if isinstance(owner, nn.Linear) else 0 if isinstance(owner, Conv1D) else None
    if parameter.dim() == 3 and hasattr(owner, "is_transposed"):  # transformers' mark on modules of fused experts
        return 0 if owner.is_transposed else 1
    return None


def routers(layer: nn.Module) -> list[nn.Parameter]:
    """Matrices that choose among experts: one output per expert, the only matrix of its module, beside the experts.

    The only one, since a shared expert may be as wide as there are experts, but has another matrix that leads back.
    """
    found = []
    for parent in layer.modules():
        counts = {count for child in parent.children() if (count := _num_experts(child)) > 1}
        if counts:
            beside = [_matrices_of(child) for child in parent.children() if not _num_experts(child)]
            found += [alone[0] for alone in beside if len(alone) == 1 and len(alone[0]) in counts]
    return found


def _matrices_of(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.dim() == 2]


def _num_experts(module: nn.Module) -> int:
    """How many experts a module holds itself: fused in one parameter, or in a list of modules with matrices."""
    if isinstance(module, nn.ModuleList):
        has_matrices = all(any(parameter.dim() >= 2 for parameter in entry.parameters()) for entry in module)
        return len(module) if has_matrices else 0
    fused = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    is_convolution = isinstance(module, nn.modules.conv._ConvNd)
    return len(fused[0]) if fused and not is_convolution else 0


def _stacked_biases(layer: nn.Module) -> list[nn.Parameter]:
    """Two-dimensional parameters of modules with fused experts: a vector per expert."""
    return [
        parameter
        for module in layer.modules()
        if not isinstance(module, nn.ModuleList) and (count := _num_experts(module))
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 2 and len(parameter) == count
    ]


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


class _Watch(TorchFunctionMode):
    """Sees every product of torch and reports those with a watched weight."""

    def __init__(self, matrices: Sequence[Matrix], observe: Callable[[Product], None]) -> None:
        super().__init__()
        # By address and not by storage: the weights of a mapped checkpoint file share one storage.
        self.slices = {
            matrix.weight.data_ptr() + expert * matrix.slice_bytes: (matrix, expert)
            for matrix in matrices
            for expert in range(matrix.experts)
        }
        self.observe = observe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = _PRODUCTS.get(getattr(func, "__name__", ""))
        if operands and len(args) > operands[0] + 1 and isinstance(args[operands[0] + 1], Tensor):
            position, summed = operands
            used = args[position + 1]
            matrix, expert = self.slices.get(used.data_ptr(), (None, 0))
            if matrix is not None and used.numel() * used.element_size() >= matrix.slice_bytes:
                for product in _products(matrix, expert, args[position], used, summed, kwargs.get("offs")):
                    self.observe(product)
        return func(*args, **kwargs)


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
def observed(matrices: Sequence[Matrix], observe: Callable[[Product], None]) -> Iterator[None]:
    """Call `observe` with every product by one of `matrices` that is made within the context."""
    with _Watch(matrices, observe):
        yield


@torch.no_grad()
def learn_input_dims(matrices: Sequence[Matrix], run: Callable[[], Any]) -> None:
    """Run a pass, and note on each weight how it was used, for `Matrix.input_dim` from then on.

    Args:
        matrices: The matrices to watch.
        run: Makes a pass in which the matrices are used.
    """
    seen: dict[str, int] = {}

    def note(product: Product) -> None:
        seen[product.matrix.name] = product.input_dim

    with observed(matrices, note):
        run()
    for matrix in matrices:
        # Experts in modules of their own may have seen no token; their kind tells then. Fused ones see some, or they
        # are used in a way that cannot be observed.
        known = None if matrix.weight.dim() == 3 else matrix.input_dim
        matrix.weight.input_dim = seen.get(matrix.name, known)  # type: ignore[attr-defined]
