"""Errors of hidden states: the mean over tokens and the typical token's, in a unit that no massive activation decides.

The unit is a median over tokens, of the energy of what a window adds, or of the states themselves. Not their variance:
one token in 256 may hold 99% of that.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Errors(NamedTuple):
    """Errors on some samples, of each token in units of `unit_of`, or in nats.

    Attributes:
        mean: Mean over tokens, which a few massive activations may decide.
        typical: Median over tokens.
    """

    mean: float
    typical: float

    def is_better(self, other: "Errors") -> bool:
        """Whether both are smaller than those of another; a typical error of 0 cannot be, and must stay."""
        return self.mean < other.mean and (self.typical < other.typical or self.typical == other.typical == 0)

    @classmethod
    def from_tokens(cls, errors_N: Tensor) -> "Errors":
        """Those of tokens with these errors."""
        return cls(errors_N.mean(dtype=torch.float64).item(), errors_N.median().item())


def unit_of(energies_N: Tensor) -> float:
    """Unit of errors, given energies of tokens, each a mean over features: their median; their mean where that is 0."""
    return energies_N.median().item() or energies_N.mean(dtype=torch.float64).item()
