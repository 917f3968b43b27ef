"""Signals: Ctrl-C, SIGTERM and SIGHUP end a run at once, except inside sections that must not be left half done.

A scheduler's SIGTERM, and the SIGHUP of a terminal that was closed, are treated like Ctrl-C: as an exception, which is
caught where the message says what is kept.
Python raises it between two operations of the main thread, so that the delay is at most one operation.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from lit_recon.system.terminal import leave_terminal

HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([HANGUP] if HANGUP else []))
SAME_REQUEST = 1.0  # seconds within which signals are one request: GNU timeout, for example, sends each of them twice


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP was received."""


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
        if number == HANGUP:
            leave_terminal()
        if self.raised is not None and time.monotonic() - self.raised < SAME_REQUEST:
            return
        self.waiting = number
        self.raise_waiting()

    def raise_waiting(self) -> None:
        """Raise the waiting signal as an exception, unless in a protected section."""
        if self.waiting is None or self.sections:
            return
        number, self.waiting, self.raised = self.waiting, None, time.monotonic()
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated


_requests = _Requests()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def stoppable() -> Iterator[None]:
    """Make SIGINT raise KeyboardInterrupt, SIGTERM and SIGHUP Terminated; does nothing outside of the main thread.

    A SIGHUP that is ignored, as under nohup, stays ignored.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
        Terminated: SIGTERM or SIGHUP was received; it is a KeyboardInterrupt.
    """
    if not _in_main_thread():
        yield
        return
    earlier = {number: signal.getsignal(number) for number in SIGNALS}
    if HANGUP and earlier[HANGUP] is signal.SIG_IGN:
        del earlier[HANGUP]
    _requests.waiting = _requests.raised = None
    try:
        for number in earlier:
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
