"""OWL: layers with more outliers among their Wanda scores lose fewer weights (Yin et al. 2023, arXiv 2310.05175).

Share of outliers of layer l over all its matrices' scores A, with the threshold M (Layerwise Outlier Distribution):

    D_l = mean(A_l > M * mean(A_l))

The density 1 - S_l is linear in D_l and spans 2 lambda: 1 - S - lambda for the least D, 1 - S + lambda for the highest.
All layers are then shifted alike so that the mean is S. The paper's code takes the mean over layers as though they were
equal in size; here each counts by its weights, so that S is the share of all weights that are removed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lit_recon.pruning.allocation.layers import by_layer, check_unstructured
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import Pattern
from lit_recon.pruning.survey import Survey
from lit_recon.system.finite import NotFinite

HIGHEST = 0.999  # sparsity of a layer: some of it must stay


class OutlierShare:
    """Share of outliers among the scores of one layer, whose matrices come one at a time, twice.

    First `add` all matrices, which gives the layer's mean, then `count` the same matrices.

    Args:
        threshold: M, how many times the layer's mean score a score must exceed to be an outlier.

    Raises:
        ValueError: The threshold is not a positive number.
    """

    def __init__(self, threshold: float = 5.0) -> None:
        if not 0 < threshold < math.inf:
            raise ValueError(f"threshold={threshold}: expected a positive number of times the mean score, such as 5.")
        self.threshold = threshold
        self._sum, self._added = 0.0, 0
        self._outliers, self._counted = 0, 0

    def add(self, scores: Tensor) -> None:
        """Add a matrix to the layer's mean score.

        Args:
            scores: Of any shape, finite.

        Raises:
            NotFinite: A score is NaN or infinite.
        """
        total = float(scores.sum(dtype=torch.float32))
        if not math.isfinite(total):
            raise NotFinite("scores are NaN or infinite, so that they have no mean from which to tell outliers.")
        self._sum += total
        self._added += scores.numel()

    def count(self, scores: Tensor) -> None:
        """Count the outliers of a matrix that was added, once all of them were."""
        self._outliers += int((scores > self.threshold * self._sum / self._added).sum())
        self._counted += scores.numel()

    @property
    def share(self) -> float:
        """The share of outliers, in [0, 1]."""
        assert self._counted == self._added > 0, f"{self._added} scores were added, {self._counted} counted"
        return self._outliers / self._counted


def outlier_share(matrices: Sequence[Tensor], threshold: float = 5.0) -> float:
    """The share D_l of outliers among all scores of one layer, in [0, 1].

    Args:
        matrices: Wanda scores of the layer's matrices, each of any shape, finite.
        threshold: M, how many times the layer's mean score a score must exceed to be an outlier.

    Raises:
        NotFinite: A score is NaN or infinite.
        ValueError: The threshold is not a positive number.
    """
    outliers = OutlierShare(threshold)
    for scores in matrices:
        outliers.add(scores)
    for scores in matrices:
        outliers.count(scores)
    return outliers.share


def owl_sparsities(
    shares_by_layer: Sequence[float], sizes_by_layer: Sequence[int], sparsity: float, spread: float = 0.08
) -> list[float]:
    """The sparsity of each layer by its share of outliers; their mean, weighted by size, is `sparsity`.

    The highest and the lowest are 2 * spread apart, unless one is cut off at 0 or `HIGHEST`: then the other layers are
    shifted further, so that the mean holds. All shares equal: every layer has `sparsity`.

    Args:
        shares_by_layer: D_l, the share of outliers of each layer.
        sizes_by_layer: The number of prunable weights of each layer, positive.
        sparsity: S, the share of all weights to remove, in [0, 1).
        spread: lambda, half of what the sparsities of two layers may differ by.

    Raises:
        ValueError: `spread` is not in [0, 1).
    """
    assert len(shares_by_layer) == len(sizes_by_layer) > 0 and min(sizes_by_layer) > 0 and 0 <= sparsity < 1
    if not 0 <= spread < 1:
        raise ValueError(f"spread={spread}: expected a difference of sparsities in [0, 1), such as 0.08.")
    least, most = min(shares_by_layer), max(shares_by_layer)
    if least == most:
        return [sparsity] * len(shares_by_layer)
    wanted = [sparsity + spread - 2 * spread * (share - least) / (most - least) for share in shares_by_layer]
    highest = max(HIGHEST, sparsity)
    shift = _shift(wanted, sizes_by_layer, sparsity, highest)
    return [min(max(value + shift, 0.0), highest) for value in wanted]


def _shift(wanted: Sequence[float], sizes: Sequence[int], mean: float, highest: float) -> float:
    """What to add to all values so that their mean, weighted and each cut off at 0 and `highest`, is `mean`.

    The mean rises with the shift and is linear between the shifts at which a value reaches one of its ends.
    """

    def mean_at(shift: float) -> float:
        cut = (min(max(value + shift, 0.0), highest) for value in wanted)
        return math.fsum(size * value for size, value in zip(sizes, cut, strict=True)) / sum(sizes)

    ends = sorted(end - value for value in wanted for end in (0.0, highest))
    left, right = next((a, b) for a, b in pairwise(ends) if mean_at(b) >= mean - 1e-12)
    low, high = mean_at(left), mean_at(right)
    return left + (right - left) * (mean - low) / (high - low) if high > low else right


@dataclass(frozen=True, kw_only=True)
class Owl:
    """Sparsity of each layer by its share of outliers among Wanda's scores, whatever the criterion.

    Attributes:
        threshold: M, how many times a layer's mean score an outlier exceeds.
        spread: lambda, half of what the sparsities of two layers may differ by.
    """

    threshold: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 0 < self.threshold < math.inf:
            raise ValueError(
                f"allocation.threshold={self.threshold}: expected a number of times the mean score, such as 5."
            )
        if not 0 <= self.spread < 1:
            raise ValueError(f"allocation.spread={self.spread}: expected a difference of sparsities, such as 0.08.")

    def check(self, pattern: Pattern) -> None:
        """Raise a ValueError for a pattern that is not unstructured."""
        check_unstructured("allocation=owl", pattern)

    def describe(self) -> str:
        """In the words of the settings."""
        return f"owl (threshold {self.threshold:g}, spread {self.spread:g})"

    def allocate(self, survey: Survey, criterion: Criterion, pattern: Pattern) -> dict[str, list[Pattern]]:
        """The pattern of each matrix: that of its layer."""
        names, sizes, shares = [], [], []
        for layer in survey.each(Wanda()):
            outliers = OutlierShare(self.threshold)
            for _, scores_OI in layer.scores():
                outliers.add(scores_OI.clamp(min=0))
            for _, scores_OI in layer.scores():
                outliers.count(scores_OI.clamp(min=0))
            names.append([matrix.name for matrix in layer.matrices])
            sizes.append(layer.size)
            shares.append(outliers.share)
        return by_layer(names, owl_sparsities(shares, sizes, pattern.sparsity, self.spread), pattern)
