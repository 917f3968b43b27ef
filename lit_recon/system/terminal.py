"""The terminal: letters that it cannot show, and its end."""

import io
import os
import stat
import sys


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
