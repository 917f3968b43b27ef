"""Gram matrices of what the matrices of a window are multiplied by, on calibration samples, observed while it is dense.

From them every matrix is solved for before the window is trained. Matrices with the same input share one; a solution
for dense products on these inputs needs nothing else (gram.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from lit_recon.activations.gram import GramSums, summing_products
from lit_recon.activations.passes import CALIBRATION
from lit_recon.model.matrices import Matrix
from lit_recon.model.products import SharedInputs
from lit_recon.model.windows import Window


class WindowGrams:
    """Observes a pass over a dense window.

    Args:
        window: The window.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self._shared = SharedInputs()
        self._sums: dict[str, list[GramSums]] = {}

    @contextmanager
    def observing(self, part: str) -> Iterator[None]:
        """Sum up in a pass over calibration samples."""
        matrices = self.window.matrices() if part in CALIBRATION else ()
        with summing_products(matrices, self._shared, self._sums, sampled=0):
            yield

    def of(self, matrix: Matrix) -> list[Tensor] | None:
        """The Gram matrix (I, I) of a matrix's inputs, of each expert; None if it was in no product."""
        sums = self._sums.get(self._shared[matrix.name])
        return None if sums is None else [one.gram_II for one in sums]
