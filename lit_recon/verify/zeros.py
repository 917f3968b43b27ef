"""Zeros of one matrix: how many there are, which N:M patterns hold, and masked weights that are not zero.

N:M: of every M consecutive weights of a row, along the inputs, at most N are not zero (2:4: Mishra et al.,
"Accelerating Sparse Deep Neural Networks", arXiv 2104.08378). With c_M, the most that any M have, N:M holds if
c_M <= N, so that one pass tells of all N. Negative zero is zero; what is not a number is not.

Shapes: E experts (1 for a plain matrix), O outputs, I inputs, R rows, G groups of M weights.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2**22  # weights that are looked at together: what is counted takes a few bytes for each
_SIZES = (2, 4, 8, 16)  # M of the patterns that are looked for, each twice the one before


class Pattern(NamedTuple):
    """At most n of every m consecutive weights of a row are not zero."""

    n: int
    m: int

    def __str__(self) -> str:
        """N:M."""
        return f"{self.n}:{self.m}"

    def implies(self, other: "Pattern") -> bool:
        """Whether every matrix with this pattern has the other."""
        if other.m % self.m == 0:
            return self.n * (other.m // self.m) <= other.n
        return self.m % other.m == 0 and self.n <= other.n


CANDIDATES = tuple(Pattern(m * n // 8, m) for m in _SIZES for n in (1, 2, 4, 6) if m * n % 8 == 0)


@dataclass
class Zeros:
    """Zeros of a matrix.

    Attributes:
        weights: Its weights.
        zeros: How many are zero.
        patterns: Which of CANDIDATES hold.
        groups: Groups of the pattern that was asked for; None: none was, or its M does not divide the inputs.
        over: How many of them hold too many weights that are not zero.
        masked: Weights that the mask prunes; None without a mask.
        masked_nonzero: How many of them are not zero.
    """

    weights: int
    zeros: int = 0
    patterns: tuple[Pattern, ...] = ()
    groups: int | None = None
    over: int | None = None
    masked: int | None = None
    masked_nonzero: int | None = None


def look_at(
    weight: Tensor, input_dim: int | None, *, asked: Pattern | None = None, mask: Tensor | None = None
) -> Zeros:
    """Count the zeros of a matrix.

    Args:
        weight: (O, I), (I, O), or with the experts first, of any dtype in which a weight of zero is a zero.
        input_dim: Which of its last two dimensions runs over the inputs: 1 or 0; None: not known, and a pattern holds
            if it does so along either.
        asked: A pattern of which groups are counted.
        mask: Boolean (True = kept), in the weight's shape.
    """
    assert mask is None or mask.shape == weight.shape
    views = [_by_rows(weight, dim) for dim in ((1, 0) if input_dim is None else (input_dim,))]
    masks = [None if mask is None else _by_rows(mask, 1 if input_dim is None else input_dim), None]
    found, *others = [_look(view, asked, mask_EOI) for view, mask_EOI in zip(views, masks, strict=False)]
    for other in others:
        found.patterns = tuple(pattern for pattern in CANDIDATES if pattern in (*found.patterns, *other.patterns))
        if other.over is not None and (found.over is None or other.over < found.over):
            found.groups, found.over = other.groups, other.over
    return found


def strongest(patterns: Iterable[Pattern]) -> list[Pattern]:
    """Those patterns that no other one of them implies."""
    found = list(patterns)
    return [one for one in found if not any(other != one and other.implies(one) for other in found)]


def _by_rows(tensor: Tensor, input_dim: int) -> Tensor:
    """A view (E, O, I) of a matrix."""
    tensor_EXX = tensor if tensor.dim() == 3 else tensor[None]
    return tensor_EXX.mT if input_dim == 0 else tensor_EXX


def _look(weight_EOI: Tensor, asked: Pattern | None, mask_EOI: Tensor | None) -> Zeros:
    """Count the zeros of rows of inputs, some rows at a time."""
    width = weight_EOI.shape[-1]
    found = Zeros(weight_EOI.numel())
    most = {m: 0 for m in _SIZES if width % m == 0}
    if asked and width % asked.m == 0:
        found.groups, found.over = found.weights // asked.m, 0
    if mask_EOI is not None:
        found.masked, found.masked_nonzero = 0, 0
    for rows, mask_RI in _chunks(weight_EOI, mask_EOI):
        kept_RI = rows != 0
        found.zeros += kept_RI.numel() - int(torch.count_nonzero(kept_RI))
        if mask_RI is not None:
            found.masked = (found.masked or 0) + mask_RI.numel() - int(torch.count_nonzero(mask_RI))
            found.masked_nonzero = (found.masked_nonzero or 0) + int(torch.count_nonzero(kept_RI & ~mask_RI))
        if asked and found.over is not None:
            found.over += int(torch.count_nonzero(_group_sums(_as_counts(kept_RI), asked.m) > asked.n))
        _raise_most(most, kept_RI)
    found.patterns = tuple(pattern for pattern in CANDIDATES if pattern.m in most and most[pattern.m] <= pattern.n)
    return found


def _chunks(weight_EOI: Tensor, mask_EOI: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows (R, I) of weights and of their mask."""
    rows = max(1, CHUNK // max(1, weight_EOI.shape[-1]))
    for expert, weight_OI in enumerate(weight_EOI):
        masks = [None] * len(weight_OI) if mask_EOI is None else mask_EOI[expert].split(rows)
        yield from zip(weight_OI.split(rows), masks, strict=False)


def _raise_most(most: dict[int, int], kept_RI: Tensor) -> None:
    """Raise, for each M, the most weights of any M that are not zero; in place.

    An M of which no candidate can hold any more is left alone: of a matrix without a pattern the first chunk tells it.
    """
    open_sizes = [m for m in most if any(pattern.m == m and most[m] <= pattern.n for pattern in CANDIDATES)]
    counts_RG = _as_counts(kept_RI)
    for m in most:
        if m > max(open_sizes, default=0) or not kept_RI.numel():
            break
        counts_RG = _group_sums(counts_RG, 2)  # sizes double
        most[m] = max(most[m], int(counts_RG.max()))


def _as_counts(kept_RI: Tensor) -> Tensor:
    return kept_RI.to(torch.int16)  # M has three digits


def _group_sums(counts_RI: Tensor, size: int) -> Tensor:
    """Sums of every `size` neighbours, (R, G)."""
    total_RG = counts_RI[:, ::size].clone()  # a sum over a short dimension takes ten times as long
    for offset in range(1, size):
        total_RG += counts_RI[:, offset::size]
    return total_RG
