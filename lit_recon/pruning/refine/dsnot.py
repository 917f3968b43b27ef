"""DSnoT, "Dynamic Sparse No Training": exchange weights until outputs are right on average (arXiv 2310.08915).

Pruning takes epsilon = sum over the pruned j of w_j E[x_j] from a row's expected output. While |epsilon| falls, with
s = sign(epsilon),

    grow   the pruned weight with the largest   s w_j E[x_j] / Var[x_j]
    prune  the kept weight with the smallest    |w_j| sqrt(E[x_j^2])     of those with s w_j E[x_j] < 0

which both move epsilon towards zero. Inputs need two numbers each, where swaps.py needs their Gram matrix.

Shapes: N rows of inputs, O outputs, I inputs, R rows of the matrix that still change, G groups of M weights.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_CONSTANT = 1e-12  # of an input's mean square: its least variance, which rounding gives constant inputs as well


class InputMoments(NamedTuple):
    """Sums over rows of inputs, in float64, which the variance of inputs far from zero needs.

    Attributes:
        num_rows: Number of rows.
        sum_I: Sum of each input.
        squares_I: Sum of the squares of each input.
    """

    num_rows: int
    sum_I: Tensor
    squares_I: Tensor


class DSnoT:
    """Exchanges of one pruned for one kept weight that lower the expected change of a row's output, |epsilon|.

    Args:
        max_cycles: Most exchanges of a row; about 4 are made.
        threshold: Share of its first |epsilon| at which a row is done. The paper's threshold is a number in the unit of
            the outputs, which differs between matrices and models by orders of magnitude.

    Raises:
        ValueError: `max_cycles` is not a whole number from 1 on, or `threshold` is not in [0, 1).
    """

    def __init__(self, max_cycles: int = 50, threshold: float = 0.1) -> None:
        if type(max_cycles) is not int or max_cycles < 1:
            raise ValueError(f"refine.max_cycles={max_cycles}: expected a number of exchanges from 1 on, such as 50.")
        if type(threshold) not in (int, float) or not 0 <= threshold < 1:
            raise ValueError(
                f"refine.threshold={threshold}: expected the share of a row's first error at which it is done, in "
                "[0, 1), such as 0.1."
            )
        self.max_cycles, self.threshold = max_cycles, threshold

    def start(self, weight_OI: Tensor) -> InputMoments:
        """Sums over no rows."""
        zero_I = torch.zeros(weight_OI.shape[1], dtype=torch.float64, device=weight_OI.device)
        return InputMoments(0, zero_I, zero_I)

    def update(self, statistics: InputMoments, inputs_NI: Tensor) -> InputMoments:
        """The sums with N more rows of inputs."""
        num_rows, sum_I, squares_I = statistics
        inputs_NI = inputs_NI.double()
        return InputMoments(num_rows + len(inputs_NI), sum_I + inputs_NI.sum(0), squares_I + inputs_NI.square().sum(0))

    @torch.no_grad()
    def refine(self, weight_OI: Tensor, mask_OI: Tensor, statistics: InputMoments, width: int | None) -> Tensor:
        """A mask, boolean (O, I), of which no row has a larger |epsilon|.

        Args:
            weight_OI: The dense weight.
            mask_OI: The mask to start from, True = kept.
            statistics: Sums over the inputs.
            width: M of an N:M pattern, within whose groups weights are exchanged; None: within rows.
        """
        inputs = weight_OI.shape[1]
        assert width is None or inputs % width == 0
        num_rows = max(1, statistics.num_rows)
        mean_I, square_I = statistics.sum_I / num_rows, statistics.squares_I / num_rows
        variance_I = torch.maximum(square_I - mean_I.square(), _CONSTANT * square_I)
        weight_OI = weight_OI.float()
        scores = _Scores(
            share_OI=weight_OI * mean_I.float(),
            growth_OI=weight_OI * (mean_I / variance_I).nan_to_num_(0).float(),  # 0 / 0 of inputs that are always zero
            wanda_OI=weight_OI.abs() * square_I.sqrt().float(),
        )
        return self._exchange(scores, mask_OI.clone(), weight_OI == 0, width or inputs)

    def _exchange(self, scores: "_Scores", mask_OI: Tensor, zero_OI: Tensor, width: int) -> Tensor:
        """Exchange weights within groups of `width` columns; the mask, changed in place."""
        epsilon_R = torch.where(mask_OI, 0, scores.share_OI).sum(1)
        done_R, index_R = self.threshold * epsilon_R.abs(), torch.arange(len(mask_OI), device=mask_OI.device)
        going_R = epsilon_R.abs() > done_R
        for _ in range(self.max_cycles):
            index_R, epsilon_R, done_R = index_R[going_R], epsilon_R[going_R], done_R[going_R]
            if not len(index_R):
                break
            rows = _Scores(*(score_OI[index_R] for score_OI in scores))
            grown_R, pruned_R, found_R = rows.best(epsilon_R.sign(), mask_OI[index_R], zero_OI[index_R], width)
            row = torch.arange(len(index_R), device=index_R.device)
            after_R = epsilon_R - rows.share_OI[row, grown_R] + rows.share_OI[row, pruned_R]
            better_R = found_R & (after_R.abs() < epsilon_R.abs())
            mask_OI[index_R[better_R], grown_R[better_R]] = True
            mask_OI[index_R[better_R], pruned_R[better_R]] = False
            epsilon_R = after_R
            going_R = better_R & (after_R.abs() > done_R)
        return mask_OI


class _Scores(NamedTuple):
    """Of each weight: its share w E[x] of the output, and the scores by which weights are grown and pruned."""

    share_OI: Tensor
    growth_OI: Tensor
    wanda_OI: Tensor

    def best(self, sign_R: Tensor, mask_RI: Tensor, zero_RI: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """The columns (R,) to grow and to prune, of one group of each row; and whether there are such, boolean (R,)."""
        groups = (len(mask_RI), -1, width)
        prunable_RI = mask_RI & (self.share_OI * sign_R[:, None] < 0)
        cost_RG, pruned_RG = self.wanda_OI.masked_fill(~prunable_RI, math.inf).view(groups).min(2)
        growth_RI = (self.growth_OI * sign_R[:, None]).masked_fill_(mask_RI | zero_RI, -math.inf)
        growth_RG, grown_RG = growth_RI.view(groups).max(2)
        growth_R, group_R1 = growth_RG.masked_fill_(cost_RG.isinf(), -math.inf).max(1, keepdim=True)
        grown_R1, pruned_R1 = (group_R1 * width + place_RG.gather(1, group_R1) for place_RG in (grown_RG, pruned_RG))
        return grown_R1.squeeze(1), pruned_R1.squeeze(1), growth_R.squeeze(1) > -math.inf
