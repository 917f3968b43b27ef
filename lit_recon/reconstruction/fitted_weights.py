"""Weights that a fit changes: copied before, rounded to what will be stored, put back where the fit is not kept."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_TRACE = 0.01  # of the squared change: what rounding may take of it unseen; its share of the gain is smaller


class FittedWeights:
    """Weights of a window that its LightningModule changes.

    Args:
        parameters: The weights, in float32.
        dtypes: Those in which they will be stored.

    Attributes:
        start: Copies of them as they are now.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], dtypes: Sequence[torch.dtype]) -> None:
        self.parameters, self.dtypes = parameters, dtypes
        self.start = self.copies()

    def copies(self) -> list[Tensor]:
        """Copies of the weights as they are now."""
        return [_copy(parameter) for parameter in self.parameters]

    def by_id(self) -> dict[int, Tensor]:
        """The copies of the start, by `id` of the weight."""
        return {id(parameter): copy for parameter, copy in zip(self.parameters, self.start, strict=True)}

    @torch.no_grad()
    def restore(self, copies: Sequence[Tensor]) -> None:
        """Put copies back."""
        for parameter, copy in zip(self.parameters, copies, strict=True):
            parameter.copy_(copy)

    @torch.no_grad()
    def round(self) -> None:
        """Round to what will be stored."""
        for parameter, dtype in zip(self.parameters, self.dtypes, strict=True):
            if dtype != parameter.dtype:
                parameter.copy_(parameter.to(dtype))

    @torch.no_grad()
    def rounding_matters(self) -> bool:
        """Whether rounding takes more than a trace of what has changed since the start."""
        change, rounding = 0.0, 0.0
        for parameter, start, dtype in zip(self.parameters, self.start, self.dtypes, strict=True):
            if dtype != parameter.dtype:
                change += float((parameter - start).square().sum())
                rounding += float((parameter.to(dtype) - parameter).square().sum())
        return rounding > _TRACE * change

    def names_of_dtypes(self) -> str:
        """The dtypes in words."""
        return " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in self.dtypes}))


@torch.no_grad()
def _copy(weight: Tensor) -> Tensor:
    """A copy, in 16 bits where these hold the values exactly: those of a model whose own weights have 16 bits."""
    for dtype in (torch.bfloat16, torch.float16):
        copy = weight.to(dtype)
        if torch.equal(copy.to(weight.dtype), weight):
            return copy
    return weight.clone()
