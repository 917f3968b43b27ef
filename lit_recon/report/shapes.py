"""Shapes of JSON that reports can show: what a file must have in it, and of which kinds.

Whoever changes a file by hand, or reads one of another version, is told in words what does not fit.
"""

from collections.abc import Iterator, Mapping
from typing import Any

NUMBER, MAYBE, TEXT, FLAG = "a number", "a number or null", "text", "true or false"
LARGEST = 1e150  # that figures can still compute with


def problems_of(value: Any, shape: Any, where: str) -> Iterator[str]:
    """What is missing in a value of JSON, or of another kind than reports can show, in words.

    Args:
        value: What was read.
        shape: A kind; or a mapping of names to shapes, where "?" at the end of a name says that it may be absent or
            null, and `str` stands for any other name; or a list of one shape; None: anything.
        where: What the value is called.
    """
    if isinstance(shape, dict):
        yield from _problems_within(value, shape, where)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{where} is no list"
        for index, each in enumerate(value if isinstance(value, list) else []):
            yield from problems_of(each, shape[0], f"{where}[{index}]")
    elif shape is not None and not _is(value, shape):
        yield f"{where} is {str(value)[:40]!r} instead of {shape}"


def _problems_within(value: Any, shape: Mapping[Any, Any], where: str) -> Iterator[str]:
    """The same for a mapping."""
    if not isinstance(value, dict):
        yield f"{where or 'it'} is no mapping of names to values"
        return
    names = {str(name).removesuffix("?"): each for name, each in shape.items() if name is not str}
    needed = [name for name in shape if name is not str and not name.endswith("?")]
    if absent := [f"{where}.{name}".lstrip(".") for name in needed if name not in value]:
        yield f"without {', '.join(absent)}"
    for name, each in value.items():
        optional = f"{name}?" in shape and each is None
        if (name in names or str in shape) and not optional:
            yield from problems_of(each, names.get(name, shape.get(str)), f"{where}.{name}".lstrip("."))


def _is(value: Any, kind: str) -> bool:
    """Whether a value of JSON is of a kind."""
    if kind in (TEXT, FLAG):
        return isinstance(value, str if kind == TEXT else bool)
    if value is None or type(value) not in (int, float):
        return value is None and kind == MAYBE
    return abs(value) < LARGEST or (kind == MAYBE and isinstance(value, float))  # one that is not finite is named
