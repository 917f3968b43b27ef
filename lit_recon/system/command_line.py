"""Messages of the commands: problems collected into one message, refusals, the end of a process.

A ValueError is a message to the user: what was given, what is allowed, what to do. The commands print it without a
traceback and exit with status 2.
"""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException


class Problems:
    """Collects what is wrong, so that a user learns all of it at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        """Note one problem."""
        self.found.append(problem)

    def check(self, function: Callable[..., Any], *args: Any, about: str = "", **kwargs: Any) -> Any:
        """The function's result, or None with its error noted, after `about`."""
        try:
            return function(*args, **kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            self.add(about + str(error))
            return None

    def raise_all(self) -> None:
        """Raise a ValueError with all problems, if there are any."""
        if self.found:
            raise ValueError("\n".join(self.found))


class Refusal(Exception):
    """The user asked for something that cannot be, which only the model's weights could tell."""


def stop(message: str, *, status: int) -> NoReturn:
    """End the process with a message."""
    sys.stderr.write(message + "\n")
    raise SystemExit(status)
