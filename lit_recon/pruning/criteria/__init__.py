"""Pruning criteria, one file each: how important is each weight of a matrix?

    magnitude.py  |W|
    random.py     a draw
    wanda.py      |W| * ||x||
    ria.py        |W| as a share of its row and column, times a power of ||x||
    sparsegpt.py  the error that is left when other weights make up for it, as they then do
    given.py      masks that are given: of a sparse model, of a file

A criterion is three functions; what it needs to know of a matrix's inputs it gathers during the dense pass, batch
by batch. `python -m lit_recon.fit criterion=custom criterion._target_=mine.MyCriterion` uses a class of your own.
One with `needs_gram = True` gathers nothing and is given the Gram matrix X^T X instead, which matrices with the same
inputs share; one with a `prune` as well (`Updates`) changes the weights that stay.
"""

from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from lit_recon.pruning.patterns import Chooser

S = TypeVar("S")


@runtime_checkable
class Criterion(Protocol[S]):
    """Scores each weight of a matrix, (O outputs, I inputs), from the weight and statistics S of its inputs."""

    def start(self, weight_OI: Tensor) -> S | None:
        """The statistics before the first batch; None if the criterion does not look at inputs."""

    def update(self, statistics: S, inputs_NI: Tensor) -> S:
        """The statistics after one more batch: N rows of what the matrix is multiplied by."""

    def scores(self, weight_OI: Tensor, statistics: Any) -> Tensor:
        """Scores (O, I), given the weight and S or None; the pattern keeps the highest."""


class Pruned(NamedTuple):
    """One matrix after pruning.

    Attributes:
        mask_OI: What stays, boolean.
        weight_OI: The weights, exactly zero where they do not.
    """

    mask_OI: Tensor
    weight_OI: Tensor


@runtime_checkable
class Updates(Protocol):
    """A criterion that changes the weights that stay, so that they make up for those that go."""

    def prune(self, weight_OI: Tensor, statistics: Any, choose: Chooser) -> Pruned:
        """The matrix after pruning.

        Args:
            weight_OI: The dense weights.
            statistics: Of its inputs, as `scores` gets them.
            choose: The mask of C consecutive columns from their scores (O, C) and the index of the first
                (patterns.Choice).

        Raises:
            torch.linalg.LinAlgError: It cannot be solved for; then it is pruned by Wanda instead.
        """


def changes_weights(criterion: object) -> bool:
    """Whether the weights that stay are others than the dense ones."""
    return isinstance(criterion, Updates) or bool(getattr(criterion, "changes_weights", False))


def needs_columns(criterion: object) -> bool:
    """Whether a criterion asks for masks of some columns at a time, from left to right."""
    return isinstance(criterion, Updates)


def permutes(criterion: object) -> bool:
    """Whether a criterion has hidden channels of MLPs put into another order, where a pattern is N:M."""
    return bool(getattr(criterion, "permute", False))


def needs_gram(gatherer: object) -> bool:
    """Whether a criterion or a refinement is given the Gram matrix of a matrix's inputs."""
    return bool(getattr(gatherer, "needs_gram", False))
