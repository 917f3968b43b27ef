"""The prunable matrices of a model's layers.

A matrix is a parameter with two or more dimensions that a layer multiplies its inputs by: the weight of an nn.Linear or
of GPT-2's Conv1D, or one three-dimensional parameter that holds all experts of a mixture. How each is used follows
from its module's kind, or is learnt from a pass (products.py).

Not matrices: routers, which stay dense, the stacked biases of fused experts, and what a pass shows to be in no product.

Shapes: E experts (1 for a plain matrix), O outputs, I inputs, N rows.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_recon.model.decoder import decoder_layers


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


LayerMatrices = list[tuple[Matrix, ...]]  # by layer


def find_matrices(model: PreTrainedModel) -> LayerMatrices:
    """The matrices of each layer, used as their modules' kinds tell."""
    prefix, layers = decoder_layers(model)
    return [tuple(layer_matrices(layer, f"{prefix}.{index}")) for index, layer in enumerate(layers)]


def layer_matrices(layer: nn.Module, prefix: str) -> list[Matrix]:
    """The matrices of a layer, in the order of its parameters, named below `prefix`; without routers."""
    excluded = {id(parameter) for parameter in (*routers(layer), *_stacked_biases(layer))}
    found = []
    for path, owner in layer.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if parameter.dim() >= 2 and id(parameter) not in excluded:
                excluded.add(id(parameter))  # it may stand in two modules
                name = ".".join(filter(None, (prefix, path, leaf)))
                found.append(Matrix(name, parameter, _input_dim(owner, leaf, parameter)))
    return found


def _input_dim(owner: nn.Module, leaf: str, parameter: nn.Parameter) -> int | None:
    """The dimension of a weight that runs over the inputs, by the kind of its module; None: not known."""
    if leaf == "weight" and parameter.dim() == 2:
        return 1 if isinstance(owner, nn.Linear) else 0 if isinstance(owner, Conv1D) else None
    if parameter.dim() == 3 and hasattr(owner, "is_transposed"):  # transformers' mark on modules of fused experts
        return 0 if owner.is_transposed else 1
    return None


def routers(layer: nn.Module) -> list[nn.Parameter]:
    """Matrices that choose among experts: one output per expert, the only matrix of its module, next to the experts.

    The only one, since a shared expert may be as wide as there are experts, but has another matrix that leads back.
    """
    found = []
    for parent in layer.modules():
        counts = {count for child in parent.children() if (count := _num_experts(child)) > 1}
        if counts:
            siblings = [_matrices_of(child) for child in parent.children() if not _num_experts(child)]
            found += [alone[0] for alone in siblings if len(alone) == 1 and len(alone[0]) in counts]
    return found


def _matrices_of(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.dim() == 2 and min(parameter.shape) > 1]


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
