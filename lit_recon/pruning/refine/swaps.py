"""SparseSwaps: exchange kept for pruned weights while a row's squared error falls (arXiv 2512.10922).

Pruning leaves out r = w * (1 - m) of a row w, which costs ||X r||^2 = r^T G r with the Gram matrix G = X^T X. Restoring
a pruned weight u and removing a kept weight p instead changes that error by

    restore_u + remove_p - 2 w_u w_p G_up      restore_u = w_u^2 G_uu - 2 w_u (G r)_u
                                               remove_p  = w_p^2 G_pp + 2 w_p (G r)_p

and G r by w_p G_p - w_u G_u. Rows do not depend on each other: all of them make their own swaps at once.

Shapes: O outputs, I inputs, R rows in the batch, C columns that are compared, J and K of them to restore and to remove.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_SWAPS = 4  # of a row, from one choice of its candidates to the next
_LEAST = 1e-6  # share of its error by which a swap must lower it: beyond rounding, so that swaps come to an end
_FRESH = 0.01  # share that is left of an error, below which G r has too much rounding of the larger error
_SHRINK = 0.75  # share of rows that still swap, below which the others leave the batch
_ELEMENTS = 2**24  # of the largest array: rows at once
_COLUMNS = 1024  # of the Gram matrix in float64 at once


class Swaps:
    """Swaps of one kept for one pruned weight, the best first, each of which lowers the squared error of its row.

    Args:
        max_swaps: Most swaps of a row. Until none helps, rows make about 30 with 576 inputs and 75 with 1536.
        candidates: How many pruned and how many kept weights of a row are compared at once, all pairs of them: those
            that are best by themselves, chosen anew after a few swaps. In N:M patterns whole groups of about as many
            weights, chosen likewise. None: all weights, before each swap; for small matrices.

    Raises:
        ValueError: A setting is not a whole number from 1 on.
    """

    needs_gram: ClassVar[bool] = True

    def __init__(self, max_swaps: int = 200, candidates: int | None = 4) -> None:
        if type(max_swaps) is not int or max_swaps < 1:
            raise ValueError(f"refine.max_swaps={max_swaps}: expected a whole number of swaps from 1 on, such as 200.")
        if candidates is not None and (type(candidates) is not int or candidates < 1):
            raise ValueError(
                f"refine.candidates={candidates}: expected a whole number of weights from 1 on, such as 4, or null to "
                "compare all pairs."
            )
        self.max_swaps, self.candidates = max_swaps, candidates

    def start(self, weight_OI: Tensor) -> None:
        """No statistics of its own."""

    def update(self, statistics: None, inputs_NI: Tensor) -> None:
        """Never called: there are no statistics of its own."""

    @torch.no_grad()
    def refine(self, weight_OI: Tensor, mask_OI: Tensor, statistics: Tensor, width: int | None) -> Tensor:
        """A mask, boolean (O, I); a row whose error, in float64, is not lower keeps its own.

        Args:
            weight_OI: The dense weight.
            mask_OI: The mask to start from, True = kept.
            statistics: The Gram matrix (I, I) of the inputs, float32.
            width: M of an N:M pattern, each of whose groups keeps its count; None: each row does.
        """
        inputs = weight_OI.shape[1]
        assert width is None or inputs % width == 0
        compared = inputs if self.candidates is None else min(inputs, max(2 * self.candidates, width or 0))
        at_once = max(1, _ELEMENTS // max(inputs, compared**2))
        parts = zip(weight_OI.float().split(at_once), mask_OI.split(at_once), strict=True)
        return torch.cat([self._refine_rows(weight_RI, mask_RI, statistics, width) for weight_RI, mask_RI in parts])

    def _refine_rows(self, weight_RI: Tensor, mask_RI: Tensor, gram_II: Tensor, width: int | None) -> Tensor:
        refined_RI, left_R = mask_RI.clone(), torch.full((len(mask_RI),), self.max_swaps, device=mask_RI.device)
        fallen_R = torch.ones_like(left_R, dtype=torch.bool)
        while fallen_R.any():
            rows = _Rows(fallen_R.nonzero().squeeze(1), weight_RI, refined_RI, gram_II, left_R)
            while len(rows.index_R):
                swapped_R = self._swap(rows, width)
                if swapped_R.sum() < _SHRINK * len(swapped_R):
                    refined_RI[rows.index_R], left_R[rows.index_R] = rows.kept_RI, rows.left_R
                    fallen_R[rows.index_R] = rows.error_R < _FRESH * rows.first_R
                    rows.select(swapped_R)
        lower_R = _change(weight_RI, mask_RI, refined_RI, gram_II) < 0
        return torch.where(lower_R[:, None], refined_RI, mask_RI)

    def _swap(self, rows: "_Rows", width: int | None) -> Tensor:
        """Choose candidates and make swaps of each row among them; which rows (R,) made one."""
        if self.candidates is None:
            return rows.swap(rows.all_columns(), 0, width, most=1)
        if width is None:
            columns_RC = rows.best_columns(self.candidates)
            return rows.swap(columns_RC, columns_RC.shape[1] // 2, width, most=_SWAPS)
        return rows.swap(rows.best_groups(-(-2 * self.candidates // width), width), 0, width, most=_SWAPS)


class _Rows:
    """Rows of a matrix amid their swaps: what it costs to restore and to remove each of their weights by itself.

    Attributes:
        index_R: Which rows they are.
        left_R: How many swaps they have left.
        restore_RI: Change of the error if a weight is restored; infinite where it is kept, or zero.
        remove_RI: Change of the error if a weight is removed; infinite where it is pruned.
        first_R: The error when these were computed.
        error_R: The error now.
    """

    def __init__(self, index_R: Tensor, weight_OI: Tensor, mask_OI: Tensor, gram_II: Tensor, left_O: Tensor) -> None:
        self.index_R, self.left_R, self.gram_II = index_R, left_O[index_R], gram_II
        self.weight_RI, mask_RI = weight_OI[index_R], mask_OI[index_R]
        pruned_RI = self.weight_RI * ~mask_RI
        twice_RI = (pruned_RI @ gram_II).mul_(2)
        self.first_R = (pruned_RI * twice_RI).sum(1).div_(2)
        self.error_R = self.first_R.clone()
        twice_RI *= self.weight_RI
        square_RI = self.weight_RI.square() * gram_II.diag()
        self.restore_RI = (square_RI - twice_RI).masked_fill_(mask_RI | (self.weight_RI == 0), math.inf)
        self.remove_RI = (square_RI + twice_RI).masked_fill_(~mask_RI, math.inf)

    @property
    def kept_RI(self) -> Tensor:
        """The masks now."""
        return self.remove_RI.isfinite()

    def select(self, which_R: Tensor) -> None:
        """Leave out the rows that are not among `which_R`."""
        for name in ("index_R", "left_R", "first_R", "error_R", "weight_RI", "restore_RI", "remove_RI"):
            setattr(self, name, getattr(self, name)[which_R])

    def all_columns(self) -> Tensor:
        """All columns (R, I)."""
        return torch.arange(self.weight_RI.shape[1], device=self.weight_RI.device).expand_as(self.weight_RI)

    def best_columns(self, count: int) -> Tensor:
        """Columns (R, 2 count) of the `count` weights that are best restored, then of those that are best removed."""
        count = min(count, self.weight_RI.shape[1])
        best = [cost_RI.topk(count, largest=False, sorted=False) for cost_RI in (self.restore_RI, self.remove_RI)]
        return torch.cat([one.indices for one in best], dim=1)

    def best_groups(self, count: int, width: int) -> Tensor:
        """Columns (R, count * width) of each row's `count` groups with the best weights to restore and to remove."""
        by_group = (len(self.weight_RI), self.weight_RI.shape[1] // width, width)
        cost_RG = self.restore_RI.view(by_group).amin(2) + self.remove_RI.view(by_group).amin(2)
        group_RC = cost_RG.topk(min(count, by_group[1]), largest=False, sorted=False).indices
        return (group_RC[:, :, None] * width + torch.arange(width, device=group_RC.device)).flatten(1)

    def swap(self, columns_RC: Tensor, removed_from: int, width: int | None, *, most: int) -> Tensor:
        """Make at most `most` swaps of each row, the best one each time, of weights that have not moved in this call.

        Args:
            columns_RC: The columns that are compared.
            removed_from: Those from this place on are to remove, those before it to restore; 0: all are to do either.
            width: Swaps stay in a group of so many columns; None: anywhere.
            most: Swaps of a row.

        Returns:
            Which rows made a swap, boolean (R,).
        """
        restored, removed = slice(removed_from or None), slice(removed_from, None)
        weight_RC = self.weight_RI.gather(1, columns_RC)
        cross_RCC = -2 * weight_RC[:, :, None] * weight_RC[:, None, :] * _among(self.gram_II, columns_RC)
        cross_RJK = cross_RCC[:, restored, removed]
        if width is not None:
            group_RC = columns_RC // width
            cross_RJK = cross_RJK.masked_fill(group_RC[:, :, None] != group_RC[:, None, :], math.inf)
        restore_RJ = self.restore_RI.gather(1, columns_RC[:, restored])
        remove_RK = self.remove_RI.gather(1, columns_RC[:, removed])
        moved_RC = torch.zeros_like(weight_RC)  # -1 out of the pruned, 1 into them
        least_R = torch.where(self.first_R > 0, -_LEAST * self.first_R, -math.inf)
        for _ in range(most):
            best_R, pair_R = (cross_RJK + restore_RJ[:, :, None]).add_(remove_RK[:, None, :]).flatten(1).min(1)
            (row,) = ((best_R < least_R) & (self.left_R > 0)).nonzero(as_tuple=True)
            if not len(row):
                break
            u, p = pair_R[row] // remove_RK.shape[1], pair_R[row] % remove_RK.shape[1]
            moved_RC[row, u], moved_RC[row, p + removed_from] = -1, 1
            change_RC = cross_RCC[row, p + removed_from] - cross_RCC[row, u]
            restore_RJ[row] += change_RC[:, restored]
            remove_RK[row] -= change_RC[:, removed]
            restore_RJ[row, u], remove_RK[row, p] = math.inf, math.inf
            self.error_R[row] += best_R[row]
            self.left_R[row] -= 1
        self._move(columns_RC, moved_RC * weight_RC, moved_RC)
        return (moved_RC != 0).any(1)

    def _move(self, columns_RC: Tensor, change_RC: Tensor, moved_RC: Tensor) -> None:
        """Change r by `change_RC` at some columns, which are restored (-1) or removed (1) where they moved."""
        change_RI = embedding_bag(columns_RC, self.gram_II, per_sample_weights=change_RC, mode="sum")  # of G r
        twice_RI = change_RI.mul_(self.weight_RI).mul_(2)
        self.restore_RI -= twice_RI
        self.remove_RI += twice_RI
        for sign, before_RI, after_RI in ((-1, self.restore_RI, self.remove_RI), (1, self.remove_RI, self.restore_RI)):
            row, place = (moved_RC == sign).nonzero(as_tuple=True)
            column = columns_RC[row, place]
            square = self.weight_RI[row, column].square() * self.gram_II.diag()[column]
            after_RI[row, column] = 2 * square - before_RI[row, column]
            before_RI[row, column] = math.inf


def _among(gram_II: Tensor, columns_RC: Tensor) -> Tensor:
    """The entries (R, C, C) of the Gram matrix among the columns of each row."""
    rows, count = columns_RC.shape
    place = columns_RC[:, :, None] * len(gram_II) + columns_RC[:, None, :]
    return gram_II.reshape(-1).index_select(0, place.view(-1)).view(rows, count, count)  # indexing is five times slower


def _change(weight_RI: Tensor, before_RI: Tensor, after_RI: Tensor, gram_II: Tensor) -> Tensor:
    """Change of each row's error (R,) from one mask to another, in float64: (r' - r)^T G (r' + r)."""
    before_RI, after_RI = (weight_RI.double() * ~mask_RI for mask_RI in (before_RI, after_RI))
    difference_RI, sum_RI = after_RI - before_RI, after_RI + before_RI
    columns = zip(gram_II.split(_COLUMNS), sum_RI.split(_COLUMNS, dim=1), strict=True)
    parts = [((difference_RI @ gram_CI.double().T) * sum_RC).sum(1) for gram_CI, sum_RC in columns]
    return torch.stack(parts).sum(0)
