"""Messages and arguments of the commands: problems collected into one message, refusals, settings in Hydra's grammar.

A ValueError is a message to the user: what was given, what is allowed, what to do. The commands print it without a
traceback and exit with status 2; any other exception while a setting is looked at is that setting's problem too.
"""

import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from lit_recon.system.terminal import say

LONGEST = 400  # characters of what a library says
_NUMBER = re.compile(r"[-+.]*\d")
_ELEMENT = re.compile(r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^,])+""")  # of a list, quoted or without commas


class Problems:
    """Collects what is wrong, so that a user learns all of it at once."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.cause: Exception | None = None

    def add(self, problem: str, cause: Exception | None = None) -> None:
        """Note one problem, and the exception that told of it."""
        self.found += [problem] if problem not in self.found else []
        self.cause = self.cause or cause

    def check(self, function: Callable[..., Any], *args: Any, about: str = "", **kwargs: Any) -> Any:
        """The function's result, or None with what it raised noted, after `about`."""
        try:
            return function(*args, **kwargs)
        except Exception as error:  # whatever a value of a setting leads to
            said = in_words(error)
            self.add(said if said.startswith(about.rstrip(": ")) else about + said, error)
            return None

    def raise_all(self) -> None:
        """Raise a ValueError with all problems, if there are any."""
        if self.found:
            raise ValueError("\n".join(self.found)) from self.cause


class Refusal(Exception):
    """The user asked for something that cannot be, which only the model's weights could tell."""


@contextmanager
def concerning(settings: str) -> Iterator[None]:
    """A context in which whatever is raised is a ValueError that names these settings; a ValueError names its own."""
    try:
        yield
    except ValueError as error:
        if type(error) is ValueError:
            raise
        raise ValueError(f"{settings}: {in_words(error)}") from error
    except Exception as error:
        raise ValueError(f"{settings}: {in_words(error)}") from error


def in_words(error: BaseException) -> str:
    """What an exception says, with its kind where that is a part of it."""
    if type(error) is ValueError:
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        name = f" ({shortened(error.filename)})" if error.filename else ""
        return f"{error.strerror}{name}"
    key = getattr(error, "full_key", None)  # of OmegaConf
    said = shortened(" ".join((str(error).splitlines() or [""])[0].split()) if key else " ".join(str(error).split()))
    if key and key not in said:
        said = f"{key}: {said}"
    known = isinstance(error, (ValueError, TypeError)) or type(error).__name__ == "MisconfigurationException"
    return said if known and said else f"{type(error).__name__}: {said}" if said else type(error).__name__


def shortened(value: object, longest: int = LONGEST) -> str:
    """A value in words that fit into a message."""
    said = str(value)
    return said if len(said) <= longest else f"{said[:longest]}... ({len(said)} characters)"


def import_from_here() -> None:
    """Let files of the working directory be imported, as `python -m` does and a console script does not."""
    here = os.getcwd()
    if not getattr(sys.flags, "safe_path", False) and not {here, ""} & {*sys.path}:  # since Python 3.11
        sys.path.insert(0, here)


def stop(message: str, *, status: int, cause: BaseException | None = None) -> NoReturn:
    """End the process with a message; before it, the traceback of the `cause`, if there is one to be shown."""
    if cause is not None:
        say("".join(traceback.format_exception(cause)), error=True)
    say(f"{message}\n", error=True)
    raise SystemExit(status)


def in_hydras_grammar(argument: str, *, texts: Collection[str] = (), sweep: bool = False) -> str:
    """A word of the command line so that Hydra reads it as it was meant.

    A value that its grammar cannot read (paths with "=", brackets, accents, "~") is text, and so is what looks like a
    number, or like several values, where the setting is a text.

    Args:
        argument: <setting>=<value>; other words are left alone.
        texts: The settings that are texts, or lists of them.
        sweep: Whether several values are one run each.
    """
    setting, given, value = argument.partition("=")
    if not given or argument.startswith("-"):
        return argument
    is_text = setting.lstrip("+") in texts
    override = _parsed(argument)
    if value.startswith("[") and value.endswith("]") and (override is None or is_text):
        elements = [_quoted_if(element.strip(), is_text) for element in _ELEMENT.findall(value[1:-1])]
        listed = f"{setting}=[{','.join(elements)}]"
        return argument if _parsed(listed) is None else listed
    choice = override.value() if override else None
    several = isinstance(choice, ChoiceSweep) and choice.simple_form
    if override is None or (is_text and not sweep and several):
        return f"{setting}={_quoted(value)}"
    return f"{setting}={_quoted_if(value, is_text)}"


def as_argument(setting: str, value: object) -> str:
    """A setting that is a text as a word for a shell, by which it can be given again."""
    text = str(value)
    override = _parsed(in_hydras_grammar(f"{setting}={text}", texts=[setting]))
    same = override is not None and _text(override) == text
    return shlex.quote(f"{setting}={text if same else _quoted(text)}")


def _text(override: Override) -> Any:
    value = override._value
    return value.text if isinstance(value, QuotedString) else value


def _parsed(argument: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(argument)
    except (HydraException, RecursionError):
        return None


def _quoted_if(value: str, is_text: bool) -> str:
    """A value, quoted if Hydra cannot read it, or reads a number where a text is meant."""
    override = _parsed(f"x={value}")
    read_as_number = is_text and override is not None and type(_text(override)) in (int, float)
    return _quoted(value) if override is None or (read_as_number and _NUMBER.match(value)) else value


def _quoted(value: str) -> str:
    return QuotedString(value, Quote.single).with_quotes()
