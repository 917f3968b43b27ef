"""Clock of a run: seconds and peak memory in each of its phases, and in total, resumed runs included.

A GPU is waited for where a phase begins and where it ends: what it computes counts for the phase that asked for it.

The system counts one peak of memory. Where a part of a run begins or ends, it is read and counted anew; what was read
is part of every part that was open, so that parts may lie within each other:

    peak of a part = max over the looks from its begin to its end
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])

WALK = ("teacher", "prune", "fit", "advance", "commit")  # phases of the walk over windows
PHASES = ("load", *WALK, "evaluate")
WHOLE_WALK = "walk"  # a part, from its first phase to its last


class Peak(Protocol):
    """Peak memory between two looks at it, as lit_recon.system.memory.PeakMemory has it; this file needs no PyTorch.

    Attributes:
        is_reset: Whether each look counts anew; else each gives the peak of the process so far.
    """

    is_reset: bool

    def take(self) -> int:
        """Peak since the last look, in bytes."""


class Clock:
    """Seconds and peak memory per phase of a run; phases do not nest.

    Args:
        phases: Their names.
        memory: The peak of memory where windows are trained; None: it is not looked at.
        host: That of the CPU's memory, where it is another one.
        wait: Waits for what is being computed; None: nothing is in the background.
    """

    def __init__(
        self,
        phases: Iterable[str] = PHASES,
        memory: Peak | None = None,
        *,
        host: Peak | None = None,
        wait: Callable[[], None] | None = None,
    ) -> None:
        self.started = time.perf_counter()
        self.seconds = dict.fromkeys(phases, 0.0)
        self.memory, self.host = memory, host
        self._wait = wait
        self._peaks = {"": 0}  # bytes by part; the part without a name is the whole run
        self._host_peaks = {"": 0}
        self._open = [""]
        self._are_apart = memory is not None and memory.is_reset

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent in the context to phase `name`; the memory in it is that of the phase."""
        start = self._now()
        try:
            with self.part(name):
                yield
        finally:
            self.seconds[name] += self._now() - start

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Look at the peak memory in the context; parts may lie within each other."""
        self._look()
        self._open.append(name)
        try:
            yield
        finally:
            self._look()
            self._open.remove(name)

    def _look(self) -> None:
        """Read the peak since the last look, which counts for every part that is open."""
        for memory, peaks in ((self.memory, self._peaks), (self.host, self._host_peaks)):
            if memory is not None:
                peak = memory.take()
                for name in self._open:
                    peaks[name] = max(peaks.get(name, 0), peak)

    def _now(self) -> float:
        """The time, when all that was asked for so far is done."""
        if self._wait is not None:
            self._wait()
        return time.perf_counter()

    def peak(self, part: str = "") -> int:
        """Peak memory of a part so far, in bytes; by default of the whole run.

        Where the system cannot count anew, it is that of the process, which may be more.
        """
        self._look()
        return self._peaks.get(part, 0)

    def host_peak(self, part: str = "") -> int | None:
        """The same of the CPU's memory; None where windows are trained in it."""
        self._look()
        return None if self.host is None else self._host_peaks.get(part, 0)

    def phase_peaks(self) -> dict[str, int]:
        """Peak memory of each phase that there has been, in bytes; empty where the system cannot tell them apart."""
        return {name: self._peaks[name] for name in self.seconds if name in self._peaks} if self._are_apart else {}

    def total(self) -> float:
        """Seconds since the clock was made, plus those of the runs that it resumed."""
        return time.perf_counter() - self.started

    def summary(self) -> dict[str, float]:
        """Seconds per phase, and in total, to the millisecond."""
        return {name: round(value, 3) for name, value in (self.seconds | {"total": self.total()}).items()}

    def state(self) -> dict[str, Any]:
        """What a run that is resumed goes on from: seconds and peaks so far; JSON."""
        self._look()
        apart = {"peaks": dict(self._peaks), "host_peaks": dict(self._host_peaks), "are_apart": self._are_apart}
        return {"seconds": dict(self.seconds), "elapsed": self.total()} | apart

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of the run that is resumed: seconds are added, of peaks the larger one counts."""
        for name, value in state["seconds"].items():
            self.seconds[name] += value
        self.started -= state["elapsed"]
        for peaks, before in ((self._peaks, state["peaks"]), (self._host_peaks, state["host_peaks"])):
            for name, value in before.items():
                peaks[name] = max(peaks.get(name, 0), value)
        self._are_apart &= state["are_apart"]


def timed(phase: str) -> Callable[[Method], Method]:
    """A method whose seconds and memory count for `phase` of its object's `clock`."""

    def decorate(method: Method) -> Method:
        @wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.clock.phase(phase):
                return method(self, *args, **kwargs)

        return cast(Method, run)

    return decorate
