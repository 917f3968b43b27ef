"""Parts of a configuration as objects: what a node with a _target_ describes, with everything that is wrong with it.

A command hands in what each of its parts is an object of (fit/parts.py).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from lit_recon.settings.annotations import wrong_types
from lit_recon.settings.conf import members
from lit_recon.settings.moved import FOLDERS, MOVED
from lit_recon.settings.values import given_of, targets
from lit_recon.system.command_line import Problems, in_words


def make_part(node: Any, name: str, problems: Problems, *, kind: type, also: Mapping[str, Any] | None = None) -> Any:
    """The object that a part of a configuration describes; None with what is wrong added to the problems.

    Args:
        node: The part, as it was composed.
        name: Its name, which messages begin with.
        problems: Takes what is wrong.
        kind: The class or protocol that it shall be an object of.
        also: Types that keywords may have besides those of their annotations, by name.
    """
    before = len(problems.found)
    make = _described(node, name, problems, kind=kind)
    if make is None:
        return None
    made = None
    try:
        made = make()
    except Exception as error:
        _add_failure(error, name, str(node["_target_"]), problems, kind=kind)
    if made is not None or not problems.found[before:]:
        for problem in wrong_types(make, name, also=also):
            problems.add(problem)
    if problems.found[before:]:
        return None
    if not isinstance(made, kind):
        problems.add(f"{name}._target_={node['_target_']}: expected {_like(kind)}.")
        return None
    return made


def make_partial(
    node: Any,
    name: str,
    problems: Problems,
    *,
    leave_out: Sequence[str] = (),
    also: Mapping[str, Any] | None = None,
) -> "partial[Any] | None":
    """The partial call that a part of a configuration describes, which is made later; None with what is wrong added.

    Args:
        node: The part, as it was composed.
        name: Its name, which messages begin with.
        problems: Takes what is wrong.
        leave_out: Keywords whose types are checked elsewhere.
        also: Types that keywords may have besides those of their annotations, by name.
    """
    before = len(problems.found)
    make = _described(node, name, problems, later=True)
    for problem in wrong_types(make, name, leave_out=leave_out, also=also) if make else ():
        problems.add(problem)
    return None if problems.found[before:] else make


def _described(
    node: Any, name: str, problems: Problems, *, kind: type | None = None, later: bool = False
) -> "partial[Any] | None":
    """A partial call of a part's target with what its settings describe; None with what is wrong added."""
    if not isinstance(node, DictConfig) or "_target_" not in node.keys():  # also of no value
        problems.add(
            f"{given_of(name)}: a run needs a {name} with _target_=<file>.<class>; leave that out, or choose a member "
            f"of the group ({', '.join(members(name)) or 'none here'})."
        )
        return None
    before = len(problems.found)
    written: Any = OmegaConf.to_container(node, resolve=False)
    for key, old in targets(written, name):
        if old in MOVED:
            problems.add(f"{key}={old} has moved; use {MOVED[old]}.")
    for key in () if later else sorted(OmegaConf.missing_keys(node) - {"_target_"}):
        problems.add(f"{name}.{key} has no value; give {name}.{key}=<value>.")
    if problems.found[before:]:
        return None
    try:
        make = instantiate(node, _partial_=True, _convert_="all")
        assert isinstance(make, partial)
        return make
    except Exception as error:
        _add_failure(error, name, str(written.get("_target_")), problems, kind=kind)
        return None


def _add_failure(error: Exception, name: str, target: str, problems: Problems, *, kind: type | None) -> None:
    """Add what is wrong with a part that cannot be made."""
    cause = (error.__cause__ or error) if isinstance(error, InstantiationException) else error
    if isinstance(cause, MissingMandatoryValue):
        missing = cause.full_key or name
        problems.add(f"{missing} has no value; give {missing}=<value>.", error)
    elif isinstance(cause, ImportError):
        reason = " ".join(str(cause).split())
        moved = [f"lit_recon.{a} is lit_recon.{b} now. " for a, b in FOLDERS.items() if f"'lit_recon.{a}'" in reason]
        problems.add(
            f"{name}._target_={target}: cannot be imported ({reason}). {''.join(moved)}Expected <file>.<class>, "
            "where the file is in the working directory or the package is installed.",
            error,
        )
    elif cause is error and type(cause) is ValueError and target.startswith("lit_recon."):
        problems.add(str(cause), error)  # names its setting
    else:
        needed = f"; expected {_like(kind)}" if kind else ""
        problems.add(f"{given_of(name)}: {in_words(cause)}{needed}", error)


def _like(kind: type) -> str:
    return f"an object like {kind.__module__}.{kind.__name__}"
