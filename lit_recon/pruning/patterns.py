"""Patterns turn a criterion's scores into boolean masks (True = kept) with an exact number of kept weights.

Unstructured: the lowest scores of each row (one output's weights, Wanda's comparison group) or of the whole matrix go;
or those of a layer or of the model, which gives each matrix a pattern of its own (allocation/global_threshold.py).
N:M: of every M consecutive weights of a row, the N with the highest scores stay (keep N of every M).

Exact means by count, not by threshold: ties go to the first index, so a matrix of equal scores has its sparsity too.
A matrix may also be pruned from left to right, some columns at a time (SparseGPT): their counts add up to the same.

Shapes: O outputs, I inputs, C consecutive ones of them, R rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from lit_recon.system.finite import NotFinite, Unusable

SCOPES = ("row", "matrix", "layer", "model")  # of what the scores are compared
PAIRWISE = 8  # consecutive weights up to which all pairs are compared rather than one selected
_AT_ONCE = 2**20  # weights whose groups are counted at once: sums of booleans take eight bytes for each


@runtime_checkable
class Pattern(Protocol):
    """Which weights of a matrix stay, given their scores."""

    @property
    def sparsity(self) -> float:
        """The share of weights that are removed."""

    def describe(self) -> str:
        """One line for the plan and the model card."""

    def check(self, name: str, outputs: int, inputs: int) -> None:
        """Raise a ValueError that names the matrix when the pattern does not fit its shape."""

    def __call__(self, scores_OI: Tensor) -> Tensor:
        """The mask, boolean (O, I), for scores (O, I)."""


@runtime_checkable
class ColumnPattern(Pattern, Protocol):
    """A pattern by which a matrix can be pruned from left to right as well.

    Attributes:
        width: Inputs over which it chooses at once, of which parts of a matrix are multiples; None: any number.
    """

    width: int | None

    def columns(self, scores_OC: Tensor, first: int) -> Tensor:
        """The mask, boolean (O, C), of C columns from `first` on, given their scores alone."""


Chooser = Callable[..., Tensor]  # the mask of the columns from `first` on, given their scores (O, C) and `first`


class Choice:
    """Choice of what stays of one matrix: by a pattern, of which zeros are the first to go and never stay.

    Args:
        pattern: The pattern.
        weight_OI: The matrix before it is pruned.

    Attributes:
        width: Inputs over which the pattern chooses at once; None for any number.
    """

    def __init__(self, pattern: Pattern, weight_OI: Tensor) -> None:
        self.pattern = pattern
        self.width: int | None = getattr(pattern, "width", None)
        self._inputs = weight_OI.shape[1]
        zero_OI = weight_OI == 0
        self._zero_OI = zero_OI if zero_OI.any() else None

    def __call__(self, scores_OC: Tensor, first: int = 0) -> Tensor:
        """The mask, boolean (O, C), of C columns from `first` on; of all where there are as many scores."""
        zero_OC = None if self._zero_OI is None else self._zero_OI[:, first : first + scores_OC.shape[1]]
        if zero_OC is not None:
            scores_OC = torch.where(zero_OC, -math.inf, scores_OC)
        if scores_OC.shape[1] == self._inputs:
            mask_OC = self.pattern(scores_OC)
        else:
            assert isinstance(self.pattern, ColumnPattern)
            mask_OC = self.pattern.columns(scores_OC, first)
        return mask_OC if zero_OC is None else mask_OC & ~zero_OC


class Chosen:
    """A choice that is made already: a mask, whatever the scores."""

    width: int | None = None

    def __init__(self, mask_OI: Tensor) -> None:
        self.mask_OI = mask_OI

    def __call__(self, scores_OC: Tensor, first: int = 0) -> Tensor:
        """The mask of C columns from `first` on."""
        return self.mask_OI[:, first : first + scores_OC.shape[1]]


def check_mask(mask_OI: Tensor, weight_OI: Tensor, pattern: Pattern, label: str) -> None:
    """Check a mask by its pattern, of which a class of the user's own may make anything.

    Args:
        mask_OI: The mask of a matrix.
        weight_OI: The matrix.
        pattern: Its pattern, whose `sparsity` counts, but for a rest of less than one weight in each row; zeros never
            stay.
        label: Name of the matrix.

    Raises:
        Unusable: It is no boolean mask of the matrix's shape, or keeps another number of its weights.
    """
    name = type(pattern).__name__
    _check_form(mask_OI, weight_OI, label, name)
    rows, weights, kept = len(mask_OI), mask_OI.numel(), int(torch.count_nonzero(mask_OI))
    removed, asked = weights - kept, pattern.sparsity * weights
    zeros = 0 if removed <= asked + rows else weights - int(torch.count_nonzero(weight_OI))
    if not asked - rows <= removed <= asked + rows + zeros:
        raise Unusable(
            f"{label}: {name} keeps {kept:,} of its {weights:,} weights; expected {round(weights - asked):,} "
            f"by the pattern's sparsity of {pattern.sparsity:g}, a weight more or less in each row."
        )


def count_kept(mask_OI: Tensor, width: int | None) -> Tensor:
    """How many weights of a matrix stay in each row, or in each group of `width` of it: counts (O, groups)."""
    inputs = mask_OI.shape[1]
    parts = mask_OI.split(max(1, _AT_ONCE // inputs))
    dtype = torch.int32 if width is None else torch.int16
    return torch.cat([part.reshape(len(part), -1, width or inputs).sum(2).to(dtype) for part in parts])


def check_exchange(mask_OI: Tensor, kept_OG: Tensor, weight_OI: Tensor, *, label: str, by: object) -> None:
    """Check that a refinement keeps as many weights of each row, or group of `width`, as there were.

    Args:
        mask_OI: The refined mask.
        kept_OG: What `count_kept` said before, as a refinement may change the mask in place.
        weight_OI: The matrix.
        label: Its name.
        by: What has made the mask.

    Raises:
        Unusable: It is no boolean mask of the matrix's shape, or keeps more or fewer weights of a row or group.
    """
    name = type(by).__name__
    _check_form(mask_OI, weight_OI, label, name)
    groups = kept_OG.shape[1]
    width = weight_OI.shape[1] // groups if groups > 1 else None
    after_OG = count_kept(mask_OI, width)
    wrong = (after_OG != kept_OG).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        where = f"row {row}" + (f", group {group} of {width}" if width else "")
        raise Unusable(
            f"{label}: {name} keeps {int(after_OG[row, group])} weights of {where}, where the mask kept "
            f"{int(kept_OG[row, group])}; expected a refinement to exchange weights, as many as before."
        )


def _check_form(mask_OI: Tensor, weight_OI: Tensor, label: str, name: str) -> None:
    """Raise an Unusable for what is no boolean mask of the matrix's shape."""
    if mask_OI.dtype != torch.bool or mask_OI.shape != weight_OI.shape:
        found = f"{str(mask_OI.dtype).removeprefix('torch.')} {tuple(mask_OI.shape)}"
        raise Unusable(f"{label}: the mask that {name} makes is {found}; expected bool {tuple(weight_OI.shape)}.")


def _drop_lowest(scores_RC: Tensor, count: int) -> Tensor:
    """Mask (R, C) with the `count` lowest scores of each row False; ties broken by index, independent of the device.

    Raises:
        NotFinite: Scores are NaN.
    """
    if count == 0:
        return torch.ones_like(scores_RC, dtype=torch.bool)
    # What equals the threshold is dropped from the left until the count is exact.
    threshold_R1 = _kth_lowest(scores_RC, count)
    below_RC = scores_RC < threshold_R1
    missing_R1 = count - below_RC.sum(1, keepdim=True)
    ties_RC = scores_RC == threshold_R1
    if int(ties_RC.sum()) > int(missing_R1.sum()):
        ties_RC &= ties_RC.cumsum(1) <= missing_R1
    mask_RC = ~(below_RC | ties_RC)
    if int(torch.count_nonzero(mask_RC)) != len(mask_RC) * (mask_RC.shape[1] - count):  # no row drops more than `count`
        raise NotFinite("scores are not numbers (NaN), so that the lowest of them cannot be dropped.")
    return mask_RC


def _kth_lowest(scores_RC: Tensor, count: int) -> Tensor:
    """The score (R, 1) up to and with which `count` of each row lie; selected, as a sort costs more than a dense pass.

    On a CPU by NumPy, which is ten times as fast as torch.
    """
    if scores_RC.device.type != "cpu":
        return scores_RC.kthvalue(count, dim=1, keepdim=True).values
    array_RC = (scores_RC if scores_RC.dtype == torch.float64 else scores_RC.float()).detach().numpy()
    return torch.from_numpy(np.partition(array_RC, count - 1, axis=1)[:, count - 1 : count].copy()).to(scores_RC.dtype)


def num_removed(sparsity: float, weights: int) -> int:
    """How many of some weights a sparsity removes: floor(sparsity * weights)."""
    return int(sparsity * weights * (1 + 1e-12) + 1e-9)  # 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True, kw_only=True)
class Unstructured:
    """Remove the lowest scores, compared in each row, in the whole matrix, in a layer or in the model (`scope`)."""

    sparsity: float
    scope: str = "row"

    width = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.sparsity, (int, float)) or not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity}: expected a share of removed weights in [0, 1), such as 0.5.")
        if self.scope not in SCOPES:
            raise ValueError(f"pattern.scope={self.scope!r}: expected one of {', '.join(SCOPES)}.")

    def describe(self) -> str:
        """One line for the plan and the model card."""
        return f"unstructured {self.sparsity:.0%} per {self.scope}"

    def check(self, name: str, outputs: int, inputs: int) -> None:
        """Every shape fits."""

    def __call__(self, scores_OI: Tensor) -> Tensor:
        """The mask, boolean (O, I), for scores (O, I)."""
        return self.columns(scores_OI, 0)

    def columns(self, scores_OC: Tensor, first: int) -> Tensor:
        """The mask, boolean (O, C), of C columns from `first` on, whose drops add up from left to right."""
        assert self.scope in ("row", "matrix"), "a threshold for several matrices gives each a pattern of its own"
        rows_RC = scores_OC if self.scope == "row" else scores_OC.reshape(1, -1)
        weights = rows_RC.shape[1] // scores_OC.shape[1]  # of a column in a group whose scores are compared
        before, after = (num_removed(self.sparsity, weights * end) for end in (first, first + scores_OC.shape[1]))
        return _drop_lowest(rows_RC, after - before).view(scores_OC.shape)


@dataclass(frozen=True, kw_only=True)
class NM:
    """Keep n of every m consecutive weights of a row (2:4 is what sparse tensor cores accelerate)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        """Check the settings."""
        if type(self.n) is not int or type(self.m) is not int or not 0 < self.n <= self.m:
            raise ValueError(f"pattern.n={self.n} pattern.m={self.m}: expected 0 < n <= m (keep n of every m weights).")

    @property
    def sparsity(self) -> float:
        """The share of weights that are removed."""
        return 1 - self.n / self.m

    @property
    def width(self) -> int:
        """It chooses among m inputs at once."""
        return self.m

    def describe(self) -> str:
        """One line for the plan and the model card."""
        return f"{self.n}:{self.m} (keep {self.n} of every {self.m})"

    def check(self, name: str, outputs: int, inputs: int) -> None:
        """Raise a ValueError when the width is not a multiple of m."""
        if inputs % self.m:
            raise ValueError(
                f"pattern.m={self.m} does not divide the width {inputs} of {name}; "
                f"choose a pattern.m that divides it, or pattern=unstructured."
            )

    def __call__(self, scores_OI: Tensor) -> Tensor:
        """The mask, boolean (O, I), for scores (O, I)."""
        return self.columns(scores_OI, 0)

    def columns(self, scores_OC: Tensor, first: int) -> Tensor:
        """The mask, boolean (O, C), of C columns, a multiple of m."""
        if self.m > PAIRWISE:
            return _drop_lowest(scores_OC.reshape(-1, self.m), self.m - self.n).view(scores_OC.shape)
        return self._by_rank(scores_OC)

    def _by_rank(self, scores_OC: Tensor) -> Tensor:
        """The same by the rank of each of m scores among them, by all pairs: a third of the time for 2:4."""
        groups_MG = scores_OC.reshape(-1, self.m).T.contiguous()
        if groups_MG.isnan().any():
            raise NotFinite("scores are not numbers (NaN), so that the lowest of them cannot be dropped.")
        ranks_MG = torch.zeros(groups_MG.shape, dtype=torch.uint8, device=groups_MG.device)
        for left, right in combinations(range(self.m), 2):  # of two that are equal the left one is lower
            is_lower_G = groups_MG[left] <= groups_MG[right]
            ranks_MG[right] += is_lower_G
            ranks_MG[left] += ~is_lower_G
        return (ranks_MG >= self.m - self.n).T.reshape(scores_OC.shape)
