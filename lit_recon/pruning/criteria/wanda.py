"""Wanda: score_ij = |W_ij| * ||x_j||_2 (Sun et al. 2023, arXiv 2306.11695, equation 1).

x_j is input feature j over all calibration tokens. Its norm is gathered as a sum of squares, so that batches add up.
"""

from torch import Tensor


class Wanda:
    """A weight matters as much as its typical contribution to the output."""

    def start(self, weight_OI: Tensor) -> Tensor:
        """Sum of squares per input feature, (I,), zero."""
        return weight_OI.new_zeros(weight_OI.shape[1])

    def update(self, statistics: Tensor, inputs_NI: Tensor) -> Tensor:
        """Add the squares of N more rows of inputs; sums in float32, also where the inputs come in bf16."""
        return statistics.add_(inputs_NI.float().square().sum(0))

    def scores(self, weight_OI: Tensor, statistics: Tensor) -> Tensor:
        """|W| * ||x||, (O, I)."""
        return weight_OI.abs() * statistics.sqrt()
