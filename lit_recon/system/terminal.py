"""The terminal: all that commands print goes through `say` and `Console`, and how it ends.

A name, path or value may hold control characters, which a terminal obeys: ESC [ 31 m in the name of a file makes all
that follows red, other codes move the cursor or the window. They are shown as escapes, in text alone: rich's
own codes, for colours and bars, are none of it. Rich is not needed to print a line, and takes a while to load
(console.py).
"""

import io
import os
import re
import stat
import sys
from argparse import ArgumentParser
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but a tab and the end of a line


def printable(text: str) -> str:
    """A text with its control characters, but for tabs and ends of lines, as hexadecimal escapes."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def say(text: str, *, error: bool = False) -> None:
    """Print a text at once, before what another process prints next.

    Args:
        text: With the ends of its lines.
        error: Whether it goes to stderr.
    """
    stream = sys.stderr if error else sys.stdout
    stream.write(printable(text))
    stream.flush()


class Parser(ArgumentParser):
    """A parser of a command line whose messages are printable, also where they repeat what was given."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(printable(message), file)


def readable_output() -> None:
    """Print letters that the terminal's encoding lacks as escapes, instead of an error after hours."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not that of a notebook
            stream.reconfigure(errors="backslashreplace")


def leave_terminal() -> None:
    """Print into nothing from now on: the terminal is gone, and what is kept is written before an error says so."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # of a terminal that is gone, isatty says no
            os.dup2(nothing, descriptor)
    os.close(nothing)
