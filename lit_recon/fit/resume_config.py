"""The configuration of a run that is resumed: that of its folder, with the settings that belong to the new call.

The folder may be another person's. Of what its configuration names, only classes of lit_recon, Lightning and torch and
files of the user's own working directory run; what the command line names itself runs as always.
"""

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lit_recon.fit.output.folder import NEXT_CONFIG
from lit_recon.fit.settings import CALL
from lit_recon.fit.signature import OF_ONE_CALL, OF_THE_CALL, differences
from lit_recon.settings.trusted import check_trusted
from lit_recon.settings.values import given, plain, targets
from lit_recon.system.atomic_files import replaced
from lit_recon.system.commits import Commits
from lit_recon.system.lock import hold

log = logging.getLogger(__name__)


def resumed(cfg: DictConfig) -> DictConfig:
    """The configuration of the run that `resume` names; those settings of this call that belong to the call replace it.

    Raises:
        ValueError: There is no run to resume, its configuration is damaged or names what is not run from there, or a
            setting is given that differs.
    """
    folder = Path(cfg.resume)
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"resume={folder}: no run is there (no config.yaml); give the output_dir of an earlier run.")
    overwriting = (folder / NEXT_CONFIG).is_file()  # it ended while it cleared the folder: nothing else counts there
    if (folder / "results.json").is_file() and not overwriting:
        if (folder / "lease.lock").exists():  # of a run that was killed as it let go of its folder
            with suppress(ValueError), hold(folder):
                pass
        raise ValueError(f"resume={folder}: that run is finished; its numbers are in {folder / 'results.json'}.")
    before = saved_config(folder, NEXT_CONFIG if overwriting else "config.yaml")
    words = given()
    if "output_dir" in words and Path(str(cfg.output_dir)).absolute() != folder.absolute():
        raise ValueError(
            f"resume={folder} output_dir={cfg.output_dir}: a run is resumed in its own folder; leave output_dir "
            "out, or start a new run there without resume."
        )
    changed = [
        f"{where} is {old!r} there and {new!r} here"
        for key in sorted({key.split("/")[0].rpartition("@")[2] for key in words} - {*OF_THE_CALL})
        for where, old, new in differences(plain(OmegaConf.select(before, key)), plain(OmegaConf.select(cfg, key)), key)
    ]
    if changed:
        raise ValueError(f"resume={folder}: {'; '.join(changed)}. Leave that out, or start a new run.")
    check_trusted(before, f"resume={folder}", trusted={str(value) for _, value in targets(plain(cfg)) if value})
    for key in OF_THE_CALL:
        if key in words or key in OF_ONE_CALL or key not in before:
            OmegaConf.update(before, key, cfg[key], force_add=True)
    OmegaConf.update(before, "output_dir", str(folder))
    if overwriting:
        before.resume, before.overwrite = None, True
    return before


def saved_config(folder: Path, name: str) -> DictConfig:
    """The configuration in a run's folder; where it is damaged, that which the newest commit was made with.

    Raises:
        ValueError: It is damaged, and there is no commit.
    """
    try:
        return _read(folder / name)
    except ValueError as error:
        damaged = f"resume={folder}: {name} is damaged ({error})"
    try:
        commit = Commits(folder / "commits", resumed=True).newest()
    except ValueError as error:
        raise ValueError(f"{damaged}, and {str(error).removeprefix(f'resume={folder}: ')}") from error
    if commit is None:
        raise ValueError(f"{damaged}, and no window was done; start again with overwrite=true.")
    log.warning("%s; that of commit %d is taken", damaged, commit.number)
    return OmegaConf.create(commit.state["signature"]["config"])


def mend_config(folder: Path, config: str) -> None:
    """Write the configuration of a run that is resumed in place of that in its folder, if that is damaged."""
    try:
        _read(folder / "config.yaml")
    except ValueError:
        with replaced(folder / "config.yaml") as file:
            file.write(config.encode())


def _read(path: Path) -> DictConfig:
    """A configuration that was saved; a ValueError that says how it is damaged."""
    try:
        loaded = OmegaConf.load(path)
        needed = [key for key in CALL if key not in OF_ONE_CALL]
        missing = [key for key in needed if key not in loaded] if isinstance(loaded, DictConfig) else ["settings"]
        OmegaConf.to_container(loaded, resolve=True)
    except Exception as error:  # half of it, zeros, a tab: whatever a file can hold
        raise ValueError(" ".join(str(error).split())[:100]) from error
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    assert isinstance(loaded, DictConfig)
    return loaded


def committed(folder: Path, *keys: str) -> Any:
    """An entry of what the newest commit of a run says; None before the first, and where it cannot be read."""
    try:
        newest = max((folder / "commits").glob("*.json"), key=lambda path: path.stem)
        found = json.loads(newest.read_text(encoding="utf-8"))["state"]
        for key in keys:
            found = found[key]
        return found
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # the resumed run will say what is damaged
        return None
