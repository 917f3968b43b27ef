"""Refinement of masks, one file each: a better choice of the weights that stay, as many in each row as before.

    swaps.py  SparseSwaps: exchanges that lower the matrix's exact squared error
    dsnot.py  DSnoT: exchanges that lower the expected change of the outputs

Weights keep their dense values. What a refinement needs to know of a matrix's inputs is gathered during the dense pass.
"""

from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor

S = TypeVar("S")


@runtime_checkable
class Refinement(Protocol[S]):
    """Exchanges kept for pruned weights of a matrix, (O outputs, I inputs), by the weight and statistics S of inputs.

    A class with an attribute `needs_gram = True` has no statistics of its own: its `start` returns None, and `refine`
    is given the Gram matrix X^T X (I, I) of the inputs: float32, summed over rows, which may be singular.
    """

    def start(self, weight_OI: Tensor) -> S | None:
        """The statistics before the first batch; None if there are none of its own."""

    def update(self, statistics: S, inputs_NI: Tensor) -> S:
        """The statistics after one more batch: N rows of what the matrix is multiplied by."""

    def refine(self, weight_OI: Tensor, mask_OI: Tensor, statistics: S, width: int | None) -> Tensor:
        """A better mask, boolean (O, I), True = kept, for the dense weight.

        Args:
            weight_OI: The dense weight.
            mask_OI: The mask that a pattern made.
            statistics: Of the inputs; the Gram matrix if `needs_gram`.
            width: M of an N:M pattern: each group of so many consecutive weights keeps as many as before. None: each
                row does.

        Returns:
            A new mask. Weights that are zero and pruned stay pruned.
        """
