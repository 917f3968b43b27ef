"""Refinement of masks: which weights should stay instead of others, whatever criterion chose them, one file each.

swaps.py  exchanges that lower a row's exact error
dsnot.py  exchanges that lower its expected error
"""

from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor

S = TypeVar("S")


@runtime_checkable
class Refinement(Protocol[S]):
    """Exchanges weights that stay for others, from the dense weights and statistics S of the matrix's inputs.

    With `needs_gram = True` it gathers nothing and is given the Gram matrix X^T X, (I, I) in float32.
    """

    def start(self, weight_OI: Tensor) -> S | None:
        """The statistics before the first batch; None if there are none of its own."""

    def update(self, statistics: S, inputs_NI: Tensor) -> S:
        """The statistics after one more batch: N rows of what the matrix is multiplied by."""

    def refine(self, weight_OI: Tensor, mask_OI: Tensor, statistics: S, width: int | None) -> Tensor:
        """The refined mask, boolean (O, I), with as many weights in each row.

        Args:
            weight_OI: The dense weights.
            mask_OI: What stays so far.
            statistics: Of the matrix's inputs.
            width: Consecutive inputs among which as many stay as before (M of N:M); None: all of a row.
        """
