"""SparseGPT: prunes a matrix from left to right, and lets the weights that follow make up for each one that goes.

    score of w_j:  w_j^2 / [H_F^-1]_jj                           H = X^T X + damping * mean(diag) * I
    update:        w_k -= w_j [H_F^-1]_jk / [H_F^-1]_jj, k > j   F = {j, j + 1, ...}: the columns that are left

(Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1.) All that is needed of these inverses is in one triangular
matrix for all rows of the weights, U with H^-1 = U^T U:  [H_F^-1]_jj = U_jj^2, and the quotient is U_jk / U_jj.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lit_recon.pruning.criteria import Pruned
from lit_recon.pruning.patterns import Chooser

_LEAF = 16  # columns that are updated one by one
_INVERTED = 128  # columns of a triangular matrix that are inverted at once


class _Factor(NamedTuple):
    """U of H^-1 = U^T U, in float32.

    Attributes:
        lower_II: U_jk / U_jj in row k and column j.
        diagonal_I: U_jj.
        dead_I: Whether an input is always zero.
    """

    lower_II: Tensor
    diagonal_I: Tensor
    dead_I: Tensor


class SparseGPT:
    """A weight matters as much as the error it leaves when those after it make up for it as well as they can.

    Columns are pruned from left to right, a block at a time:

    1. The block is scored by its weights as they have become, and the pattern chooses its mask.
    2. What goes in a column changes the weights of all columns after it. Not one by one: the left half of the matrix
       hands on what it lost to the right half in one product, and so do halves of halves, down to a few columns.

    Masks and weights are those of algorithm 1, which goes column by column, but for rounding. Matrices with the same
    Gram matrix share its factor, which is kept as long as that lives and no other one is used.

    Args:
        block_size: Columns whose mask is chosen at once; N:M patterns choose for one group at a time.
        damping: Added to the diagonal of the Gram matrix, in units of its mean over inputs that are not always zero.
            Grows tenfold, up to 1, until the Cholesky factor exists.

    Raises:
        ValueError: A setting is out of its range.
    """

    needs_gram = True

    def __init__(self, block_size: int = 128, damping: float = 0.01) -> None:
        if type(block_size) is not int or block_size < 1:
            raise ValueError(f"criterion.block_size={block_size!r}: expected a number of columns, such as 128.")
        if not isinstance(damping, (int, float)) or not 0 < damping <= 1:
            raise ValueError(f"criterion.damping={damping!r}: expected a share of the mean in (0, 1], such as 0.01.")
        self.block_size, self.damping = block_size, damping
        self._factors = WeakIdKeyDictionary()  # at most one, with the version of its Gram matrix

    def start(self, weight_OI: Tensor) -> None:
        """No statistics of its own: it is given Gram matrices."""

    def update(self, statistics: None, inputs_NI: Tensor) -> None:
        """Never called: there are no statistics."""

    def scores(self, weight_OI: Tensor, statistics: Tensor) -> Tensor:
        """The error that each weight leaves where it alone goes, w^2 / [H^-1]_jj, (O, I), in float32.

        Raises:
            torch.linalg.LinAlgError: The Gram matrix is not positive, also with damping of 1.
        """
        factor = self._factor(statistics)
        inverse_I = (factor.lower_II * factor.diagonal_I).square().sum(1)
        return (weight_OI.float().square() / inverse_I).masked_fill_(factor.dead_I, 0)

    def prune(self, weight_OI: Tensor, statistics: Tensor, choose: Chooser) -> Pruned:
        """Mask and weights after pruning.

        Args:
            weight_OI: The dense weights.
            statistics: Gram matrix X^T X of the inputs, (I, I); may be singular.
            choose: The mask of C consecutive columns from their scores (O, C) and the index of the first.

        Returns:
            The mask, and the weights in the dtype of the dense ones. What stays of inputs that are always zero stays
            as it is.

        Raises:
            torch.linalg.LinAlgError: The Gram matrix is not positive, also with damping of 1.
        """
        factor = self._factor(statistics)
        scale_I1 = factor.diagonal_I.reciprocal().masked_fill_(factor.dead_I, 0)[:, None]
        weight_IO = weight_OI.detach().T.to(torch.float32, copy=True).contiguous()  # transposed: columns in one piece
        removed_IO = torch.empty_like(weight_IO)  # from the start of a block on: 1 where a weight goes; then the weight
        mask_OI = torch.empty(weight_OI.shape, dtype=torch.bool, device=weight_OI.device)

        def update(done: slice, to: slice) -> None:
            weight_IO[to].addmm_(factor.lower_II[to, done], removed_IO[done], alpha=-1)

        def prune_block(first: int, last: int) -> None:
            block = slice(first, last)
            scores_OC = (weight_IO[block].abs() * scale_I1[block]).T  # the root of the score
            mask_OI[:, block] = choose(scores_OC, first)
            removed_IO[block] = ~mask_OI[:, block].T
            _from_left(first, last, _LEAF, prune_columns, update)

        def prune_columns(first: int, last: int) -> None:
            for column in range(first, last):
                weight_O = weight_IO[column]
                if column > first:
                    weight_O.addmv_(removed_IO[first:column].T, factor.lower_II[column, first:column], alpha=-1)
                removed_IO[column].mul_(weight_O)

        _from_left(0, len(weight_IO), getattr(choose, "width", None) or self.block_size, prune_block, update)
        return Pruned(mask_OI, weight_IO.sub_(removed_IO).T.to(weight_OI.dtype).contiguous())

    def _factor(self, gram_II: Tensor) -> _Factor:
        """The factor of a Gram matrix; the last one, where that is of the same."""
        version, factor = self._factors.get(gram_II, (None, None))
        if factor is None or version != gram_II._version:  # more rows may have been added in place
            self._factors.clear()
            factor = _factor_of(gram_II, self.damping)
            self._factors[gram_II] = gram_II._version, factor
        return factor


def _from_left(
    first: int, last: int, step: int, act: Callable[[int, int], None], update: Callable[[slice, slice], None]
) -> None:
    """Act on columns, `step` at a time, each time after these were updated by all before them.

    Args:
        first: The first column.
        last: The one after the last.
        step: Number of columns that `act` takes at once.
        act: Is called with the first column and the one after the last.
        update: Is called with columns that are done and with those after them that they change.
    """
    if last - first <= step:
        act(first, last)
        return
    middle = first + -(-(last - first) // step) // 2 * step
    _from_left(first, middle, step, act, update)
    update(slice(first, middle), slice(middle, last))
    _from_left(middle, last, step, act, update)


def _factor_of(gram_II: Tensor, damping: float) -> _Factor:
    """The factor of a Gram matrix with damping, with ten times as much where there is none.

    H itself is factored, with its columns in reverse: H = R R^T with R upper triangular, so that U = R^-1.

    Raises:
        torch.linalg.LinAlgError: The Gram matrix is not positive, also with damping of 1.
    """
    dead_I = gram_II.diagonal() == 0
    mean = gram_II.diagonal().sum(dtype=torch.float64) / (~dead_I).sum().clamp(min=1)
    while True:
        damped_II = gram_II.flip(0, 1).double()  # float32 loses 1% of the mean next to a feature 10^5 times as large
        damped_II.diagonal().add_(damping * mean).masked_fill_(dead_I.flip(0), 1)
        upper_II, info = torch.linalg.cholesky_ex(damped_II, upper=True)
        if info == 0 and upper_II.diagonal().isfinite().all():
            break
        if damping >= 1:
            raise torch.linalg.LinAlgError("The Gram matrix of the inputs is not positive, also with damping of 1.")
        damping = min(1.0, 10 * damping)
    del damped_II
    upper_II = upper_II.float()
    _invert(upper_II)
    lower_II = upper_II.flip(0, 1)
    diagonal_I = lower_II.diagonal().clone()
    return _Factor(lower_II.div_(diagonal_I), diagonal_I, dead_I)


def _invert(upper_II: Tensor) -> None:
    """Invert an upper triangular matrix in place; by its halves, in half the time of a solve for the identity."""
    size = len(upper_II)
    if size <= _INVERTED:
        identity_II = torch.eye(size, dtype=upper_II.dtype, device=upper_II.device)
        upper_II.copy_(torch.linalg.solve_triangular(upper_II, identity_II, upper=True))
        return
    first, last = slice(0, size // 2), slice(size // 2, size)
    _invert(upper_II[first, first])
    _invert(upper_II[last, last])
    upper_II[first, last] = -(upper_II[first, first] @ upper_II[first, last]) @ upper_II[last, last]
