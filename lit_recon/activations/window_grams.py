"""Gram matrices of what the matrices of a window are multiplied by, on calibration samples, observed while it is dense.

From them matrices are pruned (SparseGPT), masks refined, and matrices solved for before a window is trained. Those with
the same input share one; a solution for dense products on these inputs needs nothing else (gram.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from lit_recon.activations.gram import GramSums, summing_products
from lit_recon.activations.passes import CALIBRATION
from lit_recon.model.matrices import Matrix
from lit_recon.model.products import SharedInputs


class Grams(Protocol):
    """Gram matrices of the inputs of some matrices on calibration samples."""

    def of(self, matrix: Matrix) -> list[GramSums] | None:
        """The sums for a matrix, of each expert; None if it was in no product."""


class WindowGrams:
    """Observes a pass over a dense window.

    Args:
        matrices: The window's matrices.
    """

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self._matrices = [matrix for matrix in matrices if matrix.input_dim is not None]
        self._shared = SharedInputs()
        self._sums: dict[str, list[GramSums]] = {}

    @contextmanager
    def observing(self, part: str) -> Iterator[None]:
        """Sum up in a pass over calibration samples."""
        matrices = self._matrices if part in CALIBRATION else ()
        with summing_products(matrices, self._shared, self._sums, sampled=0):
            yield

    def of(self, matrix: Matrix) -> list[GramSums] | None:
        """The sums for a matrix, of each expert; None if it was in no product."""
        return self._sums.get(self._shared[matrix.name])
