"""RIA, relative importance and activations (Zhang et al., "Plug-and-Play", ICLR 2024).

    score_ij = (|W_ij| / sum_k |W_ik| + |W_ij| / sum_k |W_kj|) * ||x_j||_2 ^ alpha

A weight is compared with those of the same output and with those of the same input, so that no input loses all its
weights for being small throughout. x_j is input feature j over all calibration tokens, as in Wanda.

With N:M patterns the hidden channels of MLPs may be put into another order first, by which more of the scores is kept
(pruning/permutation.py).
"""

import math

import torch
from torch import Tensor


class RIA:
    """A weight matters as much as its share of its row and of its column, and as its input is large.

    Args:
        alpha: Exponent of the norm of an input: 0 leaves the inputs out; the paper has 0.5.
        permute: Whether hidden channels of MLPs are put into the order in which an N:M pattern keeps most.

    Raises:
        ValueError: `alpha` is negative or not finite.
    """

    def __init__(self, alpha: float = 0.5, permute: bool = False) -> None:
        if not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
            raise ValueError(f"criterion.alpha={alpha!r}: expected an exponent of at least 0, such as 0.5.")
        self.alpha, self.permute = alpha, permute

    @property
    def changes_weights(self) -> bool:
        """Whether the weights that stay are others than the dense ones: in another order."""
        return self.permute

    def start(self, weight_OI: Tensor) -> Tensor:
        """Sum of squares per input feature, (I,), zero."""
        return weight_OI.new_zeros(weight_OI.shape[1], dtype=torch.float32)

    def update(self, statistics: Tensor, inputs_NI: Tensor) -> Tensor:
        """Add the squares of N more rows of inputs; sums in float32, also where the inputs come in bf16."""
        return statistics.add_(inputs_NI.float().square().sum(0))

    def scores(self, weight_OI: Tensor, statistics: Tensor) -> Tensor:
        """Relative importance * ||x|| ** alpha, (O, I), in float32; zero in rows and columns of zeros."""
        size_OI = weight_OI.abs().float()
        by_row_O1, by_column_I = size_OI.sum(1, keepdim=True), size_OI.sum(0)
        for sums in (by_row_O1, by_column_I):
            sums.masked_fill_(sums == 0, 1)  # of zeros alone, which stay zeros
        return (size_OI / by_row_O1 + size_OI / by_column_I) * statistics.sqrt() ** self.alpha
