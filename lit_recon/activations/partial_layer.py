"""A layer run no further than to the products of one of its matrices, with the matrices before that dense or done.

The matrices of a layer are fitted one after the other, each in a copy, while the layer itself stays dense. Where it
runs on sparse hidden states, those that are done take their places in it: what comes after them is trained on what
they have become. On inputs of the dense layer each would make up again for what those before it have made up for
already: SmolLM2, solved so, ended with a perplexity of 365, far above that of the pruned model, 28.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from lit_recon.model.decoder import LayerCall
from lit_recon.model.matrices import Matrix
from lit_recon.model.products import Product
from lit_recon.model.windows import MatrixWindow, Window


class _EnoughError(Exception):
    """Raised within a layer's forward that has shown all that is looked at."""


class PartialLayer:
    """A layer up to one of its matrices.

    The first batch runs through the whole layer. If the matrix is multiplied by one row for each token there, the layer
    is left in other batches as soon as these rows were seen: most of it comes after q, k and v.

    Args:
        layer: The window of the layer, which is dense.
        matrix: The matrix, of which whoever observes its products tells by `saw`.
        done: The matrices of the layer that are fitted.
    """

    def __init__(self, layer: Window, matrix: Matrix, done: Sequence[MatrixWindow] = ()) -> None:
        self.layer, self.matrix, self.done = layer, matrix, tuple(done)
        self._awaited, self._is_first, self._one_each = 0, True, False

    def forward(self, hidden_BTD: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        """The dense layer's outputs, or its inputs where it was left."""
        self._awaited = hidden_BTD[..., 0].numel()  # rows that are still to come
        try:
            outputs_BTD = self.layer(hidden_BTD, calls)
        except _EnoughError:
            return hidden_BTD
        if self._is_first:
            self._is_first, self._one_each = False, self._awaited == 0
        return outputs_BTD

    def forward_with_done(self, hidden_BTD: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        """The same of the layer with the matrices that are done."""
        with _in_place(self.done):
            return self.forward(hidden_BTD, calls)

    def saw(self, product: Product) -> None:
        """Take note of rows that the matrix was multiplied by; the layer is left here where they were the last."""
        self._awaited -= product.rows_NI.shape[0]
        if self._one_each and self._awaited == 0 and self.matrix.experts == 1:
            raise _EnoughError


@contextmanager
def _in_place(done: Sequence[MatrixWindow]) -> Iterator[None]:
    """A context in which fitted copies and the layer's dense weights have changed places."""

    def exchange() -> None:
        for window in done:
            window.weight.data, window.matrix.weight.data = window.matrix.weight.data, window.weight.data

    exchange()
    try:
        yield
    finally:
        exchange()
