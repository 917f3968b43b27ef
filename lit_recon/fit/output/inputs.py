"""Inputs of a run: what its configuration names on the disk. None may lie in what the run clears or writes."""

import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object

from lit_recon.fit.output.folder import ACTIVATIONS, RUN_FILES
from lit_recon.settings.values import targets, texts
from lit_recon.system.cache import cache_folder

OUTPUTS = ("output_dir", "resume", "push", "hydra")  # settings that name no input


def check_inputs(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise a ValueError where a run in `folder` would remove or overwrite what it reads."""
    home = folder.resolve()
    cleared = [home / name for name in (*RUN_FILES, ACTIVATIONS)]
    for name, path in _inputs(config):
        for inside in (path, *(path.iterdir() if path.is_dir() else ())):  # a folder of links, like the Hub's
            real = Path(os.path.realpath(inside))  # which a link to itself does not stop
            if found := next((one for one in cleared if one == real or one in real.parents), None):
                raise ValueError(
                    f"{name}={path} lies in {folder / found.name}, which a run in output_dir={folder} replaces; choose "
                    "another output_dir, or move it first."
                )


def own_files(config: Mapping[str, Any]) -> dict[str, Path]:
    """The files of the classes and functions that a configuration names, except those of installed packages."""
    found = {}
    for _, value in targets(config):
        if not value.startswith("lit_recon."):
            path = _source(value)
            if path and not {"site-packages", "dist-packages"} & {*path.parts}:
                found[value] = path
    return found


def _inputs(config: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Name and path of whatever is read."""
    yield "LIT_RECON_CACHE", cache_folder()
    for name, path in own_files(config).items():
        yield f"_target_={name}", path
    for key, value in texts(config):
        if key.partition(".")[0] not in OUTPUTS and "\0" not in value:
            path = Path(os.path.expanduser(value))  # these two take any text, as Path's methods do not
            while any(mark in path.name for mark in "*?["):  # of a pattern, the folder in which it is looked for
                path = path.parent
            if value and os.path.exists(path):
                yield key, path


def _source(target: str) -> Path | None:
    """The file of what a dotted path names: of its definition, or of the module where an instance stands."""
    try:
        path = inspect.getsourcefile(get_object(target))
    except TypeError:
        path = getattr(sys.modules.get(target.rpartition(".")[0]), "__file__", None)
    return Path(path) if path else None
