"""Which learning rates a window is tried at: retreat from one that fails, or a probe that looks for the best.

Rates are factors of the module's own learning rate. A window's tries are judged on held-out samples.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Protocol

from lit_recon.model.errors import Errors

STEP = 2.0  # between rates that are probed
FURTHEST = 1 / 256  # the smallest factor that is probed; of a kind whose rate is known, two steps below that
HIGHEST = 8.0  # the largest
FEW = 12  # windows of a kind, of which no better rate is looked for than one that gains enough
ENOUGH = 1 / 4  # of the error: what is enough for the first of few windows
FAR_BELOW = 1 / 4  # of the usual gain: a window that gains less is compared with its neighbours in rate


@dataclass(frozen=True, kw_only=True)
class Try:
    """One fit of a window at one rate.

    Attributes:
        rate: Factor of the learning rate.
        before: Held-out errors of the pruned window.
        held_out: Held-out errors afterwards.
        calibration: Errors on calibration samples afterwards, of one that was better than those before; else None.
        diverged: Whether a loss or an error was not finite.
        steps: Steps of the optimizer.
        lost: Share of the gain that rounding to the model's dtype took.
        remark: The module's remark, and what was unusual.
        kept_step: After how many steps the weights were what is kept of it.
        stopped_early: Whether it ended for want of patience.
        halved: Whether the rate was halved within it, as the loss was not finite.
    """

    rate: float
    before: Errors
    held_out: Errors
    calibration: Errors | None
    diverged: bool
    steps: int
    lost: float
    remark: str = ""
    kept_step: int = 0
    stopped_early: bool = False
    halved: bool = False

    @property
    def accepted(self) -> bool:
        """Whether the window is better than pruned: its mean error and its typical one."""
        return not self.diverged and self.held_out.is_better(self.before)

    def is_better_than(self, best: "Try | None") -> bool:
        """Whether it is accepted, and leaves less of the error than the best one before it, if there is one."""
        return self.accepted and (best is None or self.left < best.left)

    @property
    def is_same_at_any_rate(self) -> bool:
        """Whether another rate would change nothing: no step was made, or rounding takes all that steps change."""
        return not self.diverged and (self.lost == 1 or not self.steps)

    @property
    def left(self) -> float:
        """Share of the error that is left."""
        return math.inf if self.diverged else share_left(self.before, self.held_out)


class RateSearch(Protocol):
    """Says at which rates a window is tried."""

    def next(self, kind: str, tries: Sequence[Try]) -> float | None:
        """The rate of the next try of a window of some kind, given those before; None: no further one."""

    def learn(self, kind: str, rate: float, left: float) -> None:
        """Take note of a window that was accepted at a rate, with a share of its error left."""


class RetryRates:
    """The module's own rate; a window that is not better is tried again at smaller ones, in order.

    Args:
        rates: Shares of the learning rate.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        self.rates = (1.0, *rates)

    def next(self, kind: str, tries: Sequence[Try]) -> float | None:
        """The next of the rates until a try is accepted."""
        over = tries and (tries[-1].accepted or tries[-1].is_same_at_any_rate)
        return None if over or len(tries) == len(self.rates) else self.rates[len(tries)]

    def learn(self, kind: str, rate: float, left: float) -> None:
        """Nothing: windows do not depend on each other."""


class ProbedRates:
    """The best rate of the first window of each kind, by held-out error, for the windows of that kind that follow.

    The first window is tried at the module's rate and at halves of it until one is worse than the one before, or at
    doubles where the first half is worse. A later window is compared with the neighbouring rates only if it was not
    accepted, or gained far less than windows of its kind usually do. Of a kind with few windows, whose comparison would
    cost more than it wins, the first rate that gains enough is taken, or the best on the way down, in steps of two.
    Where windows were trained before, what follows begins at their usual rate, and the first rate that is accepted is
    taken: there is less to gain, and a try is a pass over all samples through all layers.

    Args:
        names: Names of all windows.
        before: Rates of windows that were trained before, the accepted ones.
    """

    def __init__(self, names: Iterable[str], *, before: Sequence[float] = ()) -> None:
        self._before = median_low(before) if before else None
        self._numbers = Counter(map(_without_numbers, names))
        self._rate: dict[str, float] = {}
        self._gains: dict[str, list[float]] = {}

    def next(self, kind: str, tries: Sequence[Try]) -> float | None:
        """The next rate on the way down, or up where down is worse."""
        if not tries:
            latest = next(reversed(self._rate.values()), self._before or 1.0)
            return self._rate.get(kind, latest)
        if tries[-1].is_same_at_any_rate or self._is_usual(kind, tries[0]):
            return None
        few = self._numbers[kind.partition(",")[0]] < FEW
        is_known = kind in self._rate or self._before is not None
        if few and tries[-1].accepted and (is_known or 1 - tries[-1].left >= ENOUGH):
            return None
        step = STEP**2 if few else STEP
        best = min(tries, key=lambda one: one.left)
        lowest, highest = (choose(one.rate for one in tries) for choose in (min, max))
        if best.rate == lowest or not any(one.accepted for one in tries):
            furthest = self._rate[kind] / STEP**2 if kind in self._rate else FURTHEST
            return lowest / step if lowest / step >= furthest else None
        return highest * step if best.rate == highest < HIGHEST and not few else None

    def learn(self, kind: str, rate: float, left: float) -> None:
        """Carry the rate to the next windows of its kind."""
        self._rate[kind] = rate
        self._gains.setdefault(kind, []).append(1 - left)

    def _is_usual(self, kind: str, first: Try) -> bool:
        """Whether a try at the rate that was carried gained about what windows of its kind gain."""
        return kind in self._rate and first.accepted and 1 - first.left >= FAR_BELOW * median(self._gains[kind])


def kind_of(name: str, measure: str) -> str:
    """What windows have in common of which the names differ in numbers alone, such as `block_#.mlp.up_proj`."""
    return f"{_without_numbers(name)}, {measure}"


def _without_numbers(name: str) -> str:
    return re.sub(r"[0-9]+", "#", name)


def share_left(before: Errors, after: Errors) -> float:
    """Share of the typical error that is left: the mean one may be that of a few massive activations."""
    return after.typical / before.typical if before.typical else 1.0
