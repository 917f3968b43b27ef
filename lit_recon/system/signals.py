"""Signals: Ctrl-C and SIGTERM end a run at once, except inside sections that must not be left half done.

A scheduler's SIGTERM is treated like Ctrl-C: as an exception, which is caught where the message says what is kept.
Python raises it between two operations of the main thread, so that the delay is at most one operation.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST = 1.0  # seconds within which signals are one request: GNU timeout, for example, sends each of them twice


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


@dataclass
class _Requests:
    """Requests to stop: signals belong to the process, so there is a single instance.

    Attributes:
        sections: Protected sections that the main thread is in.
        waiting: Signal that was received in a protected section and not raised yet.
        raised: Time at which a signal was last raised as an exception.
    """

    sections: int = 0
    waiting: int | None = None
    raised: float | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.raised is not None and time.monotonic() - self.raised < SAME_REQUEST:
            return
        self.waiting = number
        self.raise_waiting()

    def raise_waiting(self) -> None:
        """Raise the waiting signal as an exception, unless in a protected section."""
        if self.waiting is None or self.sections:
            return
        number, self.waiting, self.raised = self.waiting, None, time.monotonic()
        raise Terminated("stopped by SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt


_requests = _Requests()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def stoppable() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt and Terminated; does nothing outside of the main thread.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
        Terminated: SIGTERM was received; it is a KeyboardInterrupt.
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
        _requests.sections += 1  # signals that arrive now are too late
        for number, handler in earlier.items():
            if handler is not None:  # None: installed by C code, which Python cannot do
                signal.signal(number, handler)
        _requests.sections -= 1
        _requests.waiting = None


@contextmanager
def protected() -> Iterator[None]:
    """Protect a section from interruption, for example a commit: signals wait until its end.

    If the section itself fails, they wait for the end of the next section.
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
