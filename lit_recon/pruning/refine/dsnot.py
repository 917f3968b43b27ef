"""DSnoT: exchange weights of a row while its expected error falls, without training (arXiv 2310.08915).

What pruning leaves out of row r changes its output by an amount that is expected to be

    e_r = sum over pruned k of W_rk E[x_k]

In each cycle the pruned weight that makes up for most of it comes back, that with the largest

    sign(e_r) W_rk E[x_k] / Var[x_k]

and the kept weight of the least importance |W_rk| ||x_k|| goes whose loss helps too: sign(e_r) W_rk E[x_k] < 0.

Shapes: O outputs, I inputs, R rows that still change, G groups of M inputs.
"""

import math

import torch
from torch import Tensor

_LEAST_VARIANCE = 1e-12  # of an input's energy: one that never changes is divided by that


class DSnoT:
    """Exchanges one pruned for one kept weight of each row, cycle after cycle.

    Args:
        max_cycles: Most exchanges of a row.
        threshold: Expected error, in units of the output, at which a row is left as it is.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(self, max_cycles: int = 50, threshold: float = 0.1) -> None:
        if type(max_cycles) is not int or max_cycles < 1:
            raise ValueError(f"refine.max_cycles={max_cycles}: expected a whole number of exchanges, such as 50.")
        if not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf:
            raise ValueError(f"refine.threshold={threshold}: expected an error of 0 or more, such as 0.1.")
        self.max_cycles, self.threshold = max_cycles, threshold

    def start(self, weight_OI: Tensor) -> Tensor:
        """Number, sum and sum of squares of each input, (3, I) in float64, zero."""
        return torch.zeros(3, weight_OI.shape[1], dtype=torch.float64, device=weight_OI.device)

    def update(self, statistics: Tensor, inputs_NI: Tensor) -> Tensor:
        """Add N more rows of inputs."""
        inputs_NI = inputs_NI.double()
        statistics[0] += len(inputs_NI)
        statistics[1] += inputs_NI.sum(0)
        statistics[2] += inputs_NI.square().sum(0)
        return statistics

    @torch.no_grad()
    def refine(self, weight_OI: Tensor, mask_OI: Tensor, statistics: Tensor, width: int | None) -> Tensor:
        """The mask after the last cycle, boolean (O, I).

        Args:
            weight_OI: The dense weights.
            mask_OI: What stays so far.
            statistics: Of the inputs.
            width: M of N:M, in each group of which as many stay; None: in each row.
        """
        count, total_I, squares_I = statistics
        mean_I, energy_I = total_I / count, squares_I / count
        variance_I = (energy_I - mean_I.square()).clamp(
            min=torch.finfo(torch.float64).tiny + _LEAST_VARIANCE * energy_I
        )
        effects_OI = weight_OI.double() * mean_I
        gains_OI, importance_OI = effects_OI / variance_I, weight_OI.double().abs() * squares_I.sqrt()
        mask_OI = mask_OI.clone()
        error_O = (effects_OI * ~mask_OI).sum(1)
        rows_R = (error_O.abs() > self.threshold).nonzero()[:, 0]
        for _ in range(self.max_cycles):
            if not len(rows_R):
                break
            mask_RI, effects_RI, error_R = mask_OI[rows_R], effects_OI[rows_R], error_O[rows_R]
            sign_R1 = error_R.sign()[:, None]
            makes_up_RI = effects_RI * sign_R1
            grown_RI = (gains_OI[rows_R] * sign_R1).masked_fill_(mask_RI | (makes_up_RI <= 0), -math.inf)
            dropped_RI = importance_OI[rows_R].masked_fill_(~mask_RI | (makes_up_RI >= 0), math.inf)
            grow_R, drop_R, found_R = _best(grown_RI, dropped_RI, width)
            at_R = torch.arange(len(rows_R), device=rows_R.device)
            new_R = error_R - effects_RI[at_R, grow_R] + effects_RI[at_R, drop_R]
            found_R &= new_R.abs() < error_R.abs()
            changed_R = rows_R[found_R]
            mask_OI[changed_R, grow_R[found_R]] = True
            mask_OI[changed_R, drop_R[found_R]] = False
            error_O[changed_R] = new_R[found_R]
            rows_R = changed_R[new_R[found_R].abs() > self.threshold]
        return mask_OI


def _best(grown_RI: Tensor, dropped_RI: Tensor, width: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The weight that comes back and the one that goes, of each row, and whether there are both.

    Of patterns with groups both are of one group: of those that have both, the one with the best to come back.
    """
    groups = 1 if width is None else grown_RI.shape[1] // width
    grown_RG, grow_RG = grown_RI.unflatten(1, (groups, -1)).max(-1)
    dropped_RG, drop_RG = dropped_RI.unflatten(1, (groups, -1)).min(-1)
    best_R, group_R = grown_RG.masked_fill(dropped_RG.isinf(), -math.inf).max(1)
    start_R1, at_R1 = (group_R * (grown_RI.shape[1] // groups))[:, None], group_R[:, None]
    grow_R1, drop_R1 = (start_R1 + one_RG.gather(1, at_R1) for one_RG in (grow_RG, drop_RG))
    return grow_R1[:, 0], drop_R1[:, 0], best_R > -math.inf
