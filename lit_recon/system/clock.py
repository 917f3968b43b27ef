"""Clock of a run: seconds in each of its phases, and in total, resumed runs included."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])

WALK = ("teacher", "prune", "fit", "advance", "commit")  # phases of the walk over windows
PHASES = ("load", *WALK, "evaluate")


class Clock:
    """Seconds per phase of a run; phases do not nest.

    Args:
        phases: Their names.
    """

    def __init__(self, phases: Iterable[str] = PHASES) -> None:
        self.started = time.perf_counter()
        self.seconds = dict.fromkeys(phases, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent in the context to phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def total(self) -> float:
        """Seconds since the clock was made, plus those of the runs that it resumed."""
        return time.perf_counter() - self.started

    def summary(self) -> dict[str, float]:
        """Seconds per phase, and in total, to the millisecond."""
        return {name: round(value, 3) for name, value in (self.seconds | {"total": self.total()}).items()}

    def resume(self, seconds: Mapping[str, float], elapsed: float) -> None:
        """Add the time of the run that is resumed: seconds per phase, and in total."""
        for name, value in seconds.items():
            self.seconds[name] += value
        self.started -= elapsed


def timed(phase: str) -> Callable[[Method], Method]:
    """A method whose seconds are added to `phase` of its object's `clock`."""

    def decorate(method: Method) -> Method:
        @wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.clock.phase(phase):
                return method(self, *args, **kwargs)

        return cast(Method, run)

    return decorate
