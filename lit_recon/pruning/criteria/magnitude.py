"""Magnitude pruning: score = |W| (Han et al. 2015, arXiv 1506.02626)."""

from torch import Tensor


class Magnitude:
    """A weight matters as much as it is large; needs no data."""

    def start(self, weight_OI: Tensor) -> None:
        """No statistics."""

    def update(self, statistics: None, inputs_NI: Tensor) -> None:
        """Never called: there are no statistics."""

    def scores(self, weight_OI: Tensor, statistics: None) -> Tensor:
        """|W|, (O, I)."""
        return weight_OI.abs()
