"""Numbers that are not finite (NaN, infinity): the first of them ends a run, with a message that says where it is."""

import math
from typing import Any

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


def without_nan(value: Any) -> Any:
    """A value for JSON, which has no number for what is not finite: None in its place, also within what it holds."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
