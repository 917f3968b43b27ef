"""Random pruning: scores that are drawn; what any other criterion is measured against.

What is drawn depends on the seed and on the matrix alone, not on what was drawn before it: masks are the same for every
kind of window, after a resume, and on every device. So each matrix has a generator of its own, seeded by its weights.
"""

import hashlib

import torch
from torch import Tensor


class Random:
    """A weight matters as much as chance has it; needs no data. Matrices with equal weights have equal masks.

    Args:
        seed: Another one gives other masks.

    Raises:
        ValueError: The seed is not a whole number.
    """

    def __init__(self, seed: int = 0) -> None:
        if type(seed) is not int:
            raise ValueError(f"criterion.seed={seed!r}: expected a whole number, such as 0.")
        self.seed = seed

    def start(self, weight_OI: Tensor) -> None:
        """No statistics."""

    def update(self, statistics: None, inputs_NI: Tensor) -> None:
        """Never called: there are no statistics."""

    def scores(self, weight_OI: Tensor, statistics: None) -> Tensor:
        """Uniform in [0, 1), (O, I), in float32."""
        digest = hashlib.blake2b(str(self.seed).encode(), digest_size=8)
        digest.update(
            weight_OI.detach().float().cpu().flatten().numpy().data
        )  # float32, as 16 bits are the same numbers
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little"))
        return torch.rand(weight_OI.shape, generator=generator).to(weight_OI.device)
