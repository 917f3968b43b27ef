"""Types of settings: the annotations of what they are given to, read in one loop.

A class or function of lit_recon, Lightning or torch says by its annotations what it takes; a setting of another type is
one message that names it. What has no annotation may be anything.
"""

import inspect
import json
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lit_recon.system.command_line import shortened

PACKAGES = ("lit_recon", "lightning", "torch", "transformers")
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
    Any: "anything",
}


def wrong_types(
    make: "partial[Any]", about: str, *, leave_out: Sequence[str] = (), also: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """What is wrong with the types of the keywords of a partial call, and of the partial calls among them.

    Args:
        make: A partial call.
        about: The settings that its keywords are below, such as "module.optimizer".
        leave_out: Keywords that are checked elsewhere.
        also: By the name of a keyword, a type that it may have besides that of its annotation.
    """
    for name, value in make.keywords.items():
        if isinstance(value, partial):
            yield from wrong_types(value, f"{about}.{name}", also=also)
        if name not in leave_out and (hint := annotations(make.func).get(name)) is not None:
            yield from wrong_type(f"{about}.{name}", value, hint | also[name] if also and name in also else hint)


def wrong_type(setting: str, value: Any, hint: Any) -> Iterator[str]:
    """The problem, if a setting's value is not of the type that is asked for."""
    if not fits(value, hint):
        shown = json.dumps(value) if value is None or isinstance(value, bool) else shortened(value, 100)
        yield f"{setting}={shown}: expected {in_words(hint)}."


def annotations(make: Callable[..., Any]) -> Mapping[str, Any]:
    """Annotations of the parameters of a class or function of the known packages; none of another's."""
    function = make.__init__ if inspect.isclass(make) else make
    if (getattr(function, "__module__", None) or "").partition(".")[0] not in PACKAGES:
        return {}  # people write `path: Path` and give a text
    try:
        return get_type_hints(function)
    except Exception:  # names that are only there for a type checker
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; a whole number is a number too, a truth value is none, a list is any sequence."""
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in of)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in of)
    kind = origin or hint
    if kind is float:
        return type(value) in (int, float)
    if kind is int:
        return type(value) is int
    if kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if kind is not str and issubclass(kind, Iterable) and not issubclass(kind, Mapping):
        return isinstance(value, (list, tuple)) and all(fits(one, of[0]) for one in value if of)
    return isinstance(value, kind)


def in_words(hint: Any) -> str:
    """A type in words."""
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        plain = [one for one in of if one in _WORDS] or of
        return " or ".join(dict.fromkeys(in_words(one) for one in (*plain, *(one for one in of if get_origin(one)))))
    if origin is Literal:
        return " or ".join(map(str, of))
    kind = origin or hint
    if kind in _WORDS:
        return _WORDS[kind]
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a mapping {key: value}"
    if isinstance(kind, type) and issubclass(kind, Iterable):
        return f"a list, each {in_words(of[0])}" if of else "a list"
    if getattr(kind, "__name__", "") == "Callable":
        return "a function or class (_target_=<file>.<name>, _partial_=true)"
    return f"an object of {getattr(kind, '__name__', kind)} (_target_=...)"
