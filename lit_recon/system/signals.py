"""Ctrl-C and SIGTERM: both end a run where it is, except inside sections that must not be left half done.

A scheduler's SIGTERM is treated as Ctrl-C is: an exception that unwinds to whoever says what is kept. Python raises it
between two operations of the main thread, which takes at most as long as one of them.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = (
    1.0  # seconds within which further signals are the same request: GNU timeout, for one, sends each of its own twice
)


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


@dataclass
class _Requests:
    """What was asked for: signals belong to the process, so there is one of these.

    Attributes:
        sections: Protected sections that the main thread is in.
        waiting: A signal that was received in one of them.
        raised: When a signal was turned into an exception.
    """

    sections: int = 0
    waiting: int | None = None
    raised: float | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.raised is not None and time.monotonic() - self.raised < SAME:
            return
        self.waiting = number
        self.raise_waiting()

    def raise_waiting(self) -> None:
        """Raise what is waiting, unless in a protected section."""
        if self.waiting is None or self.sections:
            return
        number, self.waiting, self.raised = self.waiting, None, time.monotonic()
        raise Terminated("stopped by SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt


_requests = _Requests()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def stoppable() -> Iterator[None]:
    """Have SIGINT and SIGTERM raise KeyboardInterrupt and Terminated; in other threads than the main one, do nothing.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
        Terminated: SIGTERM was received; a KeyboardInterrupt too.
    """
    if not _in_main_thread():
        yield
        return
    earlier = {number: signal.getsignal(number) for number in SIGNALS}
    _requests.waiting = _requests.raised = None
    try:
        for number in SIGNALS:
            signal.signal(number, _requests.receive)
        yield
    finally:
        _requests.sections += 1  # what comes now comes too late
        for number, handler in earlier.items():
            if handler is not None:  # installed by C code: Python cannot
                signal.signal(number, handler)
        _requests.sections -= 1
        _requests.waiting = None


@contextmanager
def protected() -> Iterator[None]:
    """A section that is not interrupted, for example a commit: signals wait until its end.

    If the section itself fails, they wait for the end of the next one.
    """
    if not _in_main_thread():
        yield
        return
    _requests.sections += 1
    try:
        yield
    finally:
        _requests.sections -= 1
    _requests.raise_waiting()
