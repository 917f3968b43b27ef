"""Numbers that are not finite (NaN, infinity): the first of them ends a run, with a message that says where it is."""

import math
from typing import Any

import torch
from torch import Tensor


class Unusable(ValueError):
    """Something that was computed cannot be used, and ends a run; the message says what and why."""


class NotFinite(Unusable):
    """A number is NaN or infinite; the message says which, and what to do."""


def first_not_finite(tensor: Tensor) -> tuple[int, ...] | None:
    """Index of the first number of a tensor that is NaN or infinite; None if all are finite."""
    if tensor.sum().isfinite():  # reads the tensor once; where a sum of finite numbers overflows, each is looked at
        return None
    found = tensor.isfinite().logical_not().nonzero()
    return tuple(found[0].tolist()) if len(found) else None


class FiniteTokens:
    """Whether all outputs of a pass are finite.

    Args:
        is_read_late: Whether that is asked once, after many outputs: a GPU that is asked computes nothing meanwhile.
    """

    def __init__(self, *, is_read_late: bool) -> None:
        self.is_read_late = is_read_late
        self._looks: list[tuple[Tensor, int]] = []  # for each token whether it is finite, and the first row
        self._found: tuple[int, int] | None = None

    def look(self, outputs_BTD: Tensor, first_row: int) -> None:
        """Look at the outputs of the samples from `first_row` on."""
        if self.is_read_late:
            self._looks.append((outputs_BTD.isfinite().all(-1), first_row))
        elif self._found is None and (found := first_not_finite(outputs_BTD)):
            self._found = first_row + found[0], found[1]

    def first(self) -> tuple[int, int] | None:
        """Sample and position of the first output that is not finite since the last question; None if all are."""
        looks, self._looks = self._looks, []
        if looks and not bool(torch.stack([finite_BT.all() for finite_BT, _ in looks]).all()):
            places = (_first_false(*look) for look in looks)
            return next(place for place in places if place is not None)
        found, self._found = self._found, None
        return found


def _first_false(finite_BT: Tensor, first_row: int) -> tuple[int, int] | None:
    places = finite_BT.logical_not().nonzero()
    return (first_row + int(places[0, 0]), int(places[0, 1])) if len(places) else None


def without_nan(value: Any) -> Any:
    """A value for JSON, which has no number for what is not finite: None in its place, also within what it holds."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
