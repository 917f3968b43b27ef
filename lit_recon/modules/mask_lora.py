"""Mask LoRA: low-rank changes of the pruned matrices that keep their zeros, merged into the weights at the end.

    mask             W + s M * (B A)                                             MaskLoRA of PERP (arXiv 2312.15230)
    lora_then_mask   W + s (B A) in training, merged as W + s M * (B A)          LoRA-Prune of PERP
    hadamard         W * (B A), from B A = 1                                     ScaleLoRA of PERP
    spp              W + s W * (b repeat(A)), each row of A for O / r outputs    SPP (arXiv 2405.16057)

with s = alpha / rank, M the mask and * elementwise. Each formula stands in for the weight itself while a window is
trained (torch.nn.utils.parametrize), which serves any use of the weight: single matrices, halves and fused experts,
also where a layer is run again in the backward. peft wraps modules, with an unmasked product of its own next to theirs,
and has none of the four.

Shapes: E experts (1 for a plain matrix), O outputs, I inputs, R rank.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lit_recon.model.decoder import patched_forward
from lit_recon.model.matrices import Matrix
from lit_recon.model.windows import AnyWindow
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.modules.rates import root_mean_square

Variant = Literal["mask", "spp", "hadamard", "lora_then_mask"]


class Adapter(nn.Module):
    """The change of one matrix: a parametrization of its weight.

    Args:
        matrix: The pruned matrix.
        mask: Its boolean mask (True = kept).
        rank: Rank of the change, of each expert's.
        scale: Its factor.
        variant: The formula.
        generator: Draws A, on the CPU.

    Attributes:
        A_ERI: Uniform within 1 / sqrt(I) at the start, as LoRA has it.
        B_EOR: Zero at the start; of spp (E, O, 1). Of hadamard the first column is one, and so is the first row of A:
            with all of both alike, as in PERP's code, the rank would stay at 1.
    """

    def __init__(
        self, matrix: Matrix, mask: Tensor, *, rank: int, scale: float, variant: Variant, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.matrix, self.scale, self.variant = matrix, scale, variant
        weight_EOI = matrix.by_expert(matrix.weight.detach())
        experts, outputs, inputs = weight_EOI.shape
        bound = 1 / math.sqrt(inputs)
        start_ERI = torch.empty(experts, rank, inputs).uniform_(-bound, bound, generator=generator)
        start_EOR = torch.zeros(experts, outputs, 1 if variant == "spp" else rank)
        if variant == "hadamard":
            start_ERI[:, 0], start_EOR[..., 0] = 1, 1
        self.A_ERI, self.B_EOR = (nn.Parameter(start.to(matrix.weight)) for start in (start_ERI, start_EOR))
        self.register_buffer("removed", ~mask.to(matrix.weight.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """What the window computes with in place of the weight."""
        return self._changed(weight, masked=self.variant != "lora_then_mask")

    def size(self) -> float:
        """The size of B at which s (B A), of A as it is drawn, is as large as the weight; of spp, as large as 1."""
        rank = 1 if self.variant == "spp" else self.A_ERI.shape[1]
        weight = 1.0 if self.variant == "spp" else root_mean_square(self.matrix.weight)
        return weight / (self.scale * math.sqrt(rank) * root_mean_square(self.A_ERI))

    @torch.no_grad()
    def merge(self) -> None:
        """Put the changed weight, with its zeros, in the place of the weight."""
        self.matrix.weight.copy_(self._changed(self.matrix.weight, masked=True))

    def _changed(self, weight: Tensor, *, masked: bool) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # merged in float32, so computed in it
            if self.variant == "spp":
                outputs, rank = self.B_EOR.shape[1], self.A_ERI.shape[1]
                rows_O = torch.arange(outputs, device=weight.device) * rank // outputs
                return weight + self.scale * weight * self.matrix.as_weight(self.B_EOR * self.A_ERI[:, rows_O])
            product = self.matrix.as_weight(self.B_EOR @ self.A_ERI)
            if self.variant == "hadamard":
                return weight * product
            assert isinstance(self.removed, Tensor)
            return weight + self.scale * (product.masked_fill(self.removed, 0) if masked else product)


class MaskLora(MaskedWeights):
    """One window of which low-rank changes of the pruned matrices are trained, and norms and biases.

    Args:
        window: The pruned window; its parameters are float32.
        masks: Boolean mask per pruned matrix (True = kept), by the names that `window.matrices()` gives.
        unit: Unit of the loss.
        rank: Rank of the changes.
        alpha: Their factor is alpha / rank; of hadamard it is 1.
        variant: The formula.
        **settings: Those of MaskedWeights.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        window: AnyWindow,
        masks: Mapping[str, Tensor],
        unit: float,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        variant: Variant = "mask",
        **settings: Any,
    ) -> None:
        super().__init__(window, {}, unit, **settings)
        if type(rank) is not int or rank < 1:
            raise ValueError(f"module.rank={rank}: expected a whole number of at least 1.")
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            raise ValueError(f"module.alpha={alpha}: expected a number above 0, such as twice the rank.")
        if variant not in get_args(Variant):
            raise ValueError(f"module.variant={variant}: expected one of {', '.join(get_args(Variant))}.")
        # By the seed of the window, whatever was drawn since.
        make = partial(Adapter, rank=rank, scale=alpha / rank, variant=variant, generator=_generator())
        pruned = [matrix for matrix in window.matrices() if matrix.name in masks and self.is_chosen(matrix.weight)]
        self._adapters = [make(matrix, masks[matrix.name]) for matrix in pruned]
        self.adapters = nn.ModuleList(self._adapters)  # so that they move to the device

    def check_rank(self) -> None:
        """Raise a ValueError for a rank above that of a matrix."""
        for adapter in self._adapters:
            (_, rank, inputs), outputs = adapter.A_ERI.shape, adapter.B_EOR.shape[1]
            if rank > min(outputs, inputs):
                raise ValueError(
                    f"module.rank={rank}: {adapter.matrix.name} has {outputs} x {inputs} weights; expected a rank of "
                    f"at most {min(outputs, inputs)}, that of the matrix itself."
                )

    def trained(self) -> list[nn.Parameter]:
        """What is trained: the changes, norms and biases."""
        return [*self.adapters.parameters(), *self.vectors]

    def changed(self) -> list[nn.Parameter]:
        """What is changed of the window: the matrices, norms and biases."""
        return [*(adapter.matrix.weight for adapter in self._adapters), *self.vectors]

    def sizes(self) -> dict[Tensor, float]:
        """Of each B, which is zero at the start, the size at which the change is as large as the weight."""
        return {adapter.B_EOR: adapter.size() for adapter in self._adapters if adapter.variant != "hadamard"}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """A context in which the window computes with the changes; merged at its end, dropped after an exception."""
        with ExitStack() as stack:
            for adapter in self._adapters:
                for owner, leaf in _places(self.window, adapter.matrix):
                    stack.enter_context(_parametrized(owner, leaf, adapter))
            yield
        for adapter in self._adapters:
            adapter.merge()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(torch.initial_seed())


def _places(window: AnyWindow, matrix: Matrix) -> list[tuple[nn.Module, str]]:
    """The modules that hold a matrix's weight, and its name there."""
    modules = {id(module): module for owner in window.owners() for module in owner.modules()}.values()
    return [
        (module, leaf)
        for module in modules
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter is matrix.weight
    ]


@contextmanager
def _parametrized(owner: nn.Module, leaf: str, adapter: Adapter) -> Iterator[None]:
    """A context in which an adapter stands in for a weight, which stays the same parameter."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with parametrize.cached():  # fused experts are read one by one
            return original(*args, **kwargs)

    original, order = owner.forward, list(owner._parameters)
    parametrize.register_parametrization(owner, leaf, adapter, unsafe=True)
    try:
        with patched_forward(owner, forward):
            yield
    finally:
        parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
        for name in order:  # as it was: others go through a window's parameters in step
            owner._parameters[name] = owner._parameters.pop(name)
