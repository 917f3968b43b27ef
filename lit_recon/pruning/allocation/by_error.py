"""Sparsity per group of weights (a layer, a matrix) that makes the sum of measured errors least, at a given total.

    minimise sum_g error_g(level_g)   such that   sum_g size_g * level_g = sparsity * sum_g size_g

Each group is raised from level to level along the lower convex hull of its curve (removed weights, error); the next
step is always the one with the least error per removed weight of all groups. For convex curves that is exact: no choice
that removes as much has a lower sum (Fox 1966, Discrete optimization via marginal analysis).
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lit_recon.pruning.allocation.layers import by_layer, check_unstructured
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.patterns import NM, Pattern, Unstructured
from lit_recon.pruning.survey import Survey
from lit_recon.system.finite import NotFinite

_HIGHEST = 0.95  # sparsity of a layer
_TOLERANCE = 1e-12  # of all weights: sums of level * size are not exact


@dataclass(frozen=True, kw_only=True)
class ErrorCurve:
    """Errors of one group of weights, measured at rising levels of sparsity.

    Attributes:
        name: Of the group, for messages.
        size: Number of weights.
        levels: Sparsities in [0, 1), rising; for N:M the two levels 0 and 1 - n/m.
        errors: The error at each level, in a unit that is the same for all groups.

    Raises:
        NotFinite: An error is NaN or infinite.
    """

    name: str
    size: int
    levels: Sequence[float]
    errors: Sequence[float]

    def __post_init__(self) -> None:
        """Check the measurements."""
        assert self.size > 0 and len(self.levels) == len(self.errors) > 0, self.name
        assert self.levels[0] >= 0 and all(low < high for low, high in pairwise((*self.levels, 1.0))), self.name
        if not all(map(math.isfinite, self.errors)):
            raise NotFinite(
                f"{self.name}: errors {list(self.errors)} at sparsities {list(self.levels)} are not finite."
            )

    def error_at(self, sparsity: float) -> float:
        """The error at a sparsity between the lowest and the highest level, linear between the measured ones."""
        for (low, below), (high, above) in pairwise(zip(self.levels, self.errors, strict=True)):
            if low <= sparsity <= high:
                return below + (above - below) * (sparsity - low) / (high - low)
        return self.errors[0] if sparsity <= self.levels[0] else self.errors[-1]

    def hull(self) -> list[int]:
        """Indices of the levels on the lower convex hull of (level, error), from the lowest level to the highest."""
        found: list[int] = []
        for index in range(len(self.levels)):
            while len(found) > 1 and self._slope(found[-2], found[-1]) > self._slope(found[-1], index):
                found.pop()
            found.append(index)
        return found

    def _slope(self, low: int, high: int) -> float:
        return (self.errors[high] - self.errors[low]) / (self.levels[high] - self.levels[low])


@dataclass(frozen=True, kw_only=True)
class ErrorAllocation:
    """Sparsities of groups of weights that were chosen by their errors.

    Attributes:
        sparsities: Of each group, in the order of the curves.
        sparsity: The share of all weights that they remove.
        remainder: Weights that they remove fewer than asked for; 0 where levels are interpolated.
        error: The sum of the groups' errors, measured or between two measured ones.
    """

    sparsities: list[float]
    sparsity: float
    remainder: float
    error: float


def allocate_by_error(curves: Sequence[ErrorCurve], sparsity: float, *, interpolate: bool = True) -> ErrorAllocation:
    """Choose the sparsity of each group so that the sum of errors is least.

    Of equal steps, the one that ends at the lowest level comes first (groups that are alike rise together), then the
    first group's.

    Args:
        curves: The groups' measurements.
        sparsity: The share of all weights to remove.
        interpolate: Whether a group may end between two levels (unstructured): the last step is cut so that the total
            is met. If not (N:M), the total is never exceeded: a step that would exceed it is left out, with those that
            follow it in its group, and what is missing is filled with the next steps of other groups that fit.

    Raises:
        ValueError: The levels do not reach this sparsity.
    """
    total = sum(curve.size for curve in curves)
    target = sparsity * total
    _check_reach(curves, sparsity, total)
    chosen = [curve.levels[0] for curve in curves]
    left = target - math.fsum(curve.size * level for curve, level in zip(curves, chosen, strict=True))
    hulls = [curve.hull() for curve in curves]
    steps = [step for group, hull in enumerate(hulls) if len(hull) > 1 for step in [_step(curves, hulls, group, 1)]]
    heapq.heapify(steps)
    while steps and left > _TOLERANCE * total:
        _, level, group, position = heapq.heappop(steps)
        curve = curves[group]
        weights = curve.size * (level - chosen[group])
        if weights > left + _TOLERANCE * total:
            if interpolate:
                chosen[group] += left / curve.size
                break
            continue
        chosen[group] = level
        left -= weights
        if position + 1 < len(hulls[group]):
            heapq.heappush(steps, _step(curves, hulls, group, position + 1))
    removed = math.fsum(curve.size * level for curve, level in zip(curves, chosen, strict=True))
    return ErrorAllocation(
        sparsities=chosen,
        sparsity=removed / total,
        remainder=max(target - removed, 0.0) if target - removed > _TOLERANCE * total else 0.0,
        error=math.fsum(curve.error_at(level) for curve, level in zip(curves, chosen, strict=True)),
    )


def _step(
    curves: Sequence[ErrorCurve], hulls: Sequence[Sequence[int]], group: int, position: int
) -> tuple[float, float, int, int]:
    """A step of a group to a position of its hull: error per removed weight, the level it ends at, group, position."""
    curve, low, high = curves[group], hulls[group][position - 1], hulls[group][position]
    weights = curve.size * (curve.levels[high] - curve.levels[low])
    return (curve.errors[high] - curve.errors[low]) / weights, curve.levels[high], group, position


def _check_reach(curves: Sequence[ErrorCurve], sparsity: float, total: int) -> None:
    lowest, highest = (math.fsum(curve.size * curve.levels[end] for curve in curves) / total for end in (0, -1))
    if not lowest - _TOLERANCE <= sparsity <= highest + _TOLERANCE:
        raise ValueError(
            f"sparsity={sparsity}: errors were measured for {lowest:.4g} to {highest:.4g} of all weights removed; "
            "choose a sparsity in between, or levels that reach further."
        )


@dataclass(frozen=True, kw_only=True)
class ByError:
    """Sparsity of each layer by the errors that pruning it makes, measured on a few samples; their sum is least.

    Of N:M patterns some layers are pruned and the others stay dense.

    Attributes:
        sparsity: The share of all weights to remove; None: that of the pattern, which N:M patterns need to differ from.
        reach: How far the sparsity of a layer may be from that.
        levels: Sparsities at which the errors of a layer are measured.
        num_samples: Calibration samples, the first ones, on which.
    """

    sparsity: float | None = None
    reach: float = 0.2
    levels: int = 5
    num_samples: int = 4

    def __post_init__(self) -> None:
        """Check the settings; all problems in one message."""
        problems = []
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            problems.append(f"allocation.sparsity={self.sparsity}: expected a share in [0, 1), or null.")
        if not 0 < self.reach < 1:
            problems.append(f"allocation.reach={self.reach}: expected a difference of sparsities, such as 0.2.")
        for name, value, least in (("levels", self.levels, 2), ("num_samples", self.num_samples, 1)):
            if value < least:
                problems.append(f"allocation.{name}={value}: expected a whole number, {least} or more.")
        if problems:
            raise ValueError("\n".join(problems))

    def check(self, pattern: Pattern) -> None:
        """Raise a ValueError for a pattern whose sparsity cannot be shared out."""
        if not isinstance(pattern, NM):
            check_unstructured("allocation=error", pattern)
            if (target := self._target(pattern)) > _HIGHEST:
                raise ValueError(
                    f"allocation=error with sparsity={target}: no layer may lose more than {_HIGHEST:g}; "
                    "choose a smaller sparsity, or allocation=none."
                )
        elif self.sparsity is None or self.sparsity > pattern.sparsity:
            raise ValueError(
                f"allocation=error with pattern={pattern.describe()}: some layers are pruned and others stay dense, so "
                f"that less than {pattern.sparsity:g} is removed; give allocation.sparsity, below that."
            )

    def describe(self) -> str:
        """In the words of the settings."""
        return f"error ({self.levels} levels, reach {self.reach:g})"

    def allocate(self, survey: Survey, criterion: Criterion, pattern: Pattern) -> dict[str, list[Pattern]]:
        """The pattern of each matrix: that of its layer."""
        target = self._target(pattern)
        dense = Unstructured(sparsity=0)
        by_level = self._patterns(pattern, target)
        names, curves = [], []
        for layer in survey.each(criterion, num_samples=self.num_samples):
            errors = [layer.error(one) if level else 0.0 for level, one in by_level.items()]
            names.append([matrix.name for matrix in layer.matrices])
            curves.append(ErrorCurve(name=layer.window.name, size=layer.size, levels=[*by_level], errors=errors))
        found = allocate_by_error(curves, target, interpolate=not isinstance(pattern, NM)).sparsities
        if isinstance(pattern, NM):
            chosen = [pattern if sparsity else dense for sparsity in found]
            return {name: [one] for one, group in zip(chosen, names, strict=True) for name in group}
        return by_layer(names, found, pattern)

    def _target(self, pattern: Pattern) -> float:
        """The share of all weights to remove."""
        return pattern.sparsity if self.sparsity is None else self.sparsity

    def _patterns(self, pattern: Pattern, target: float) -> dict[float, Pattern]:
        """The patterns whose errors are measured, by their sparsities in rising order."""
        if isinstance(pattern, NM):
            return {0.0: Unstructured(sparsity=0), pattern.sparsity: pattern}
        assert isinstance(pattern, Unstructured)
        low, high = max(0.0, target - self.reach), min(_HIGHEST, target + self.reach)
        steps = [low + (high - low) * step / (self.levels - 1) for step in range(self.levels)]
        return {level: replace(pattern, sparsity=level) for level in steps}
