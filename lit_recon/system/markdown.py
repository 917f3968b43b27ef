"""Any text as a piece of Markdown in one line, in which nothing is markup: names come from files and command lines."""

import re

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}  # a backslash before these is not read everywhere
_MARKUP = re.compile(r"[\\`*_{}\[\]()|#~!]")


def as_markdown(value: object) -> str:
    """A value as text, also within a cell of a table."""
    line = "".join(_ENTITIES.get(letter, letter) for letter in one_line(value))
    return _MARKUP.sub(lambda found: f"\\{found[0]}", line)


def one_line(value: object) -> str:
    """A value as text in one line that UTF-8 can hold: names of files may have other bytes."""
    return " ".join(str(value).encode(errors="backslashreplace").decode().split())
