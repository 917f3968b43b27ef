"""Norms and biases of a window: what is trained besides its matrices.

Facts instead of names of classes: a bias is called so; a norm's weight is a vector, or one for each head, of a module
that makes no product. Further vectors (attention sinks, rates of decay) count as norms. Routers, convolutions and
weights that no product uses are neither.
"""

from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_recon.model.matrices import routers
from lit_recon.model.windows import AnyWindow

_PRODUCTS = (nn.Linear, Conv1D, nn.modules.conv._ConvNd, nn.Embedding)


class Vectors(NamedTuple):
    """Parameters of a window that are no matrices.

    Attributes:
        norms: Weights and biases of norms, and other vectors.
        biases: Biases of matrices, also stacked ones of fused experts.
    """

    norms: list[nn.Parameter]
    biases: list[nn.Parameter]


def vectors(window: AnyWindow) -> Vectors:
    """The norms and biases among a window's own parameters."""
    own = {id(parameter) for parameter in window.own_parameters()}
    others = {id(matrix.weight) for matrix in window.matrices()}
    others |= {id(parameter) for layer in window.owners() for parameter in routers(layer)}
    found = Vectors([], [])
    for owner in (module for layer in window.owners() for module in layer.modules()):
        for leaf, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in own and id(parameter) not in others:
                others.add(id(parameter))  # it may stand in two modules
                if leaf.endswith("bias") and not _is_norm(owner):
                    found.biases.append(parameter)
                elif parameter.dim() < 2 or (parameter.dim() == 2 and not isinstance(owner, _PRODUCTS)):
                    found.norms.append(parameter)
    return found


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has a vector as its weight."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1
