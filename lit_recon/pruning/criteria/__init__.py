"""Pruning criteria, one file each: how important is each weight of a matrix?

    magnitude.py  |W|
    wanda.py      |W| * ||x||

A criterion is three functions; what it needs to know of a matrix's inputs it gathers during the dense pass, batch
by batch. `python -m lit_recon.fit criterion=custom criterion._target_=mine.MyCriterion` uses a class of your own.
"""

from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor

S = TypeVar("S")


@runtime_checkable
class Criterion(Protocol[S]):
    """Scores each weight of a matrix, (O outputs, I inputs), from the weight and statistics S of its inputs."""

    def start(self, weight_OI: Tensor) -> S | None:
        """The statistics before the first batch; None if the criterion does not look at inputs."""

    def update(self, statistics: S, inputs_NI: Tensor) -> S:
        """The statistics after one more batch: N rows of what the matrix is multiplied by."""

    def scores(self, weight_OI: Tensor, statistics: S | None) -> Tensor:
        """Scores (O, I); the pattern keeps the highest."""
