"""One threshold over the scores of many matrices: how many of each one's scores are among the lowest of all.

Exact, without a sort and without all scores in memory. A float32 becomes an integer of 32 bits in the same order (its
own bits; those of negative numbers inverted but for the sign). Two passes over all scores, as in radix selection:

    1. count   histogram of the upper 16 bits, which gives the bin that holds the threshold
    2. locate  by matrix, how many scores lie below that bin, and a histogram of the lower 16 bits of those within it

Shapes: N scores of a piece, B = 2^16 bins, P = B + 1 places: 0 below the bin, then the lower bits within it.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.patterns import Pattern, Unstructured, num_removed
from lit_recon.pruning.survey import Survey
from lit_recon.system.finite import NotFinite

BINS = 1 << 16
PIECE = 1 << 17  # scores at a time: 512 KB, which stays in the cache


class GlobalThreshold:
    """Selects the lowest scores of many matrices; ties go to the matrices that were counted first.

    First `count` all matrices, then `locate` the same scores again, in any order; a matrix may come in several parts.
    Within a matrix the pattern decides which of equal scores go.

    Args:
        sparsity: The share of all scores to select, in [0, 1): floor(sparsity * their number), as patterns round.
    """

    def __init__(self, sparsity: float) -> None:
        assert 0 <= sparsity < 1, sparsity
        self.sparsity = sparsity
        self._upper_B = torch.zeros(BINS, dtype=torch.int64)
        self._sizes: dict[str, int] = {}
        self._bin: int | None = None  # that holds the threshold, once all are counted
        self._places: dict[str, tuple[Tensor, Tensor]] = {}  # those that are taken, and by how many scores

    def count(self, name: str, scores: Tensor) -> None:
        """Count the scores of a matrix (first pass).

        Args:
            name: Of the matrix.
            scores: Of any shape, float32 or shorter. -inf goes first, before all numbers.

        Raises:
            NotFinite: A score is NaN.
        """
        assert self._bin is None, "counted after the second pass began"
        histogram_B = torch.zeros(BINS, dtype=torch.int64, device=scores.device)
        for scores_N in _pieces(scores):
            if scores_N.amax().isnan():
                raise NotFinite(f"{name}: scores are not numbers (NaN), so that the lowest of them cannot be found.")
            histogram_B += torch.bincount((_keys(scores_N) >> 16).add_(BINS // 2), minlength=BINS)
        self._upper_B += histogram_B.cpu()
        self._sizes[name] = self._sizes.get(name, 0) + scores.numel()

    def locate(self, name: str, scores: Tensor) -> None:
        """Find where the scores of a matrix lie (second pass).

        Args:
            name: Of the matrix.
            scores: The same as in the first pass.
        """
        if self._bin is None:
            self._bin = _first_to_reach(self._upper_B, max(self.selected, 1))
        first = self._bin - BINS // 2 << 16  # the bin's lowest key
        places_P = torch.zeros(BINS + 1, dtype=torch.int64, device=scores.device)
        for scores_N in _pieces(scores):
            places_N = _keys(scores_N).clamp_(first - 1, first + BINS).sub_(first - 1)
            places_P += torch.bincount(places_N, minlength=BINS + 2)[:-1]  # without those above the bin
        found_P = places_P.cpu()
        if name in self._places:
            taken, times = self._places[name]
            found_P[taken] += times
        taken = found_P.nonzero()[:, 0]
        self._places[name] = (taken, found_P[taken])

    @property
    def selected(self) -> int:
        """How many scores are selected of all that were counted."""
        return num_removed(self.sparsity, sum(self._sizes.values()))

    def removed(self) -> dict[str, int]:
        """How many scores of each matrix are among the lowest of all; their sum is `selected`."""
        assert self._bin is not None and self._places.keys() == self._sizes.keys(), "not all matrices were located"
        found_P = torch.zeros(BINS + 1, dtype=torch.int64)
        for taken, times in self._places.values():
            found_P[taken] += times
        counted = self._upper_B[: self._bin + 1]
        assert found_P[0] == counted[:-1].sum() and found_P.sum() == counted.sum(), "the second pass saw other scores"
        threshold = _first_to_reach(found_P, self.selected)
        ties_left = self.selected - int(found_P[:threshold].sum())
        removed = {}
        for name in self._sizes:
            taken, times = self._places[name]
            ties = min(int(times[taken == threshold].sum()), ties_left)
            ties_left -= ties
            removed[name] = int(times[taken < threshold].sum()) + ties
        return removed


def sparsity_of(removed: int, size: int) -> float:
    """The sparsity with which a pattern of scope "matrix" removes exactly `removed` of `size` weights, or all of them.

    A pattern's sparsity is below 1; the highest such number removes all, as patterns round (`num_removed`).
    """
    return min(removed / size, math.nextafter(1, 0))


def _pieces(scores: Tensor) -> Iterator[Tensor]:
    assert torch.finfo(scores.dtype).bits <= 32, scores.dtype
    return iter(scores.reshape(-1).split(PIECE) if scores.numel() else ())


def _keys(scores_N: Tensor) -> Tensor:
    """Integers (N,) in the order of the scores."""
    bits_N = (scores_N.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: equal numbers have equal bits
    return bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)


def _first_to_reach(histogram_B: Tensor, count: int) -> int:
    """The first bin up to and with which there are at least `count` entries."""
    return int(torch.searchsorted(histogram_B.cumsum(0), count))


class SharedThreshold:
    """One threshold for the scores of a layer (pattern.scope=layer) or of the whole model (pattern.scope=model).

    Within a matrix that is a number of lowest scores, so that each gets a pattern of its own.
    """

    def check(self, pattern: Pattern) -> None:
        """Every sparsity fits."""

    def describe(self) -> str:
        """In words."""
        return "one threshold over many matrices"

    def allocate(self, survey: Survey, criterion: Criterion, pattern: Pattern) -> dict[str, list[Pattern]]:
        """The pattern of each matrix, or of each of its experts: as many weights as are below the threshold."""
        assert isinstance(pattern, Unstructured)
        whole = GlobalThreshold(pattern.sparsity)
        sizes: dict[str, int] = {}
        labels: dict[str, list[str]] = {}
        removed: dict[str, int] = {}
        for layer in survey.each(criterion):
            threshold = whole if pattern.scope == "model" else GlobalThreshold(pattern.sparsity)
            for matrix in layer.matrices:
                labels[matrix.name] = [matrix.label(expert) for expert in range(matrix.experts)]
            for label, scores_OI in layer.scores():
                threshold.count(label, scores_OI)
                sizes[label] = scores_OI.numel()
            if pattern.scope == "layer":
                for label, scores_OI in layer.scores():
                    threshold.locate(label, scores_OI)
                removed |= threshold.removed()
        if pattern.scope == "model":
            for layer in survey.each(criterion):
                for label, scores_OI in layer.scores():
                    whole.locate(label, scores_OI)
            removed = whole.removed()
        shares = {label: sparsity_of(removed[label], size) for label, size in sizes.items()}
        return {
            name: [Unstructured(sparsity=shares[label], scope="matrix") for label in of_experts]
            for name, of_experts in labels.items()
        }
