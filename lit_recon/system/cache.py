"""Cache folder: folders that are expensive to make, such as a dequantised model.

A cached folder is complete or absent: it is built next to its place under a file lock and published by one rename. A
manifest (size and CRC-32 of each file) finds truncated and bit-flipped files at every use; CRC-32 guards against
accidents, not against malice, and takes a quarter of a second for half a gigabyte where SHA-256 takes a second.
"""

import atexit
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from lit_recon.system.atomic_files import fingerprint, replaced_folder

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
Result = TypeVar("Result")


def cache_folder() -> Path:
    """The cache folder: `$LIT_RECON_CACHE`, by default `lit_recon` in the user's cache folder.

    By default it is a temporary folder where there is no home, or none that can be written.
    """
    chosen = os.environ.get("LIT_RECON_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lit_recon"
    return usable_folder(usual, remedy="set LIT_RECON_CACHE to a folder that can be written")


def usable_folder(folder: Path, *, remedy: str, written: bool = False) -> Path:
    """A folder, made where it is not there; a temporary one where that fails, the same throughout the process.

    Args:
        folder: Its path, which may begin with `~`.
        remedy: What the user is advised to do where the temporary folder is used.
        written: Whether a folder of which nothing but reading is possible is replaced too.
    """
    try:
        folder = folder.expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        return _temporary(folder, getattr(error, "strerror", None) or str(error), remedy)
    if written and not os.access(folder, os.W_OK):
        return _temporary(folder, "it cannot be written", remedy)
    return folder


@functools.cache
def _temporary(folder: Path, reason: str, remedy: str) -> Path:
    """A temporary folder instead of another, removed when the process ends."""
    made = Path(tempfile.mkdtemp(prefix="lit_recon-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    log.warning("%s: %s; what it would keep is in %s until this process ends; %s", folder, reason, made, remedy)
    return made


def cached_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """Fill `folder` by `build` at its first use, and again whenever it is found damaged.

    An intact folder is used without a lock, so that a read-only cache works too. Otherwise one process builds while
    the others wait; then they use its result.

    Args:
        folder: The place of the result.
        build: Fills the empty folder that it is given. When it raises, nothing is left behind.

    Returns:
        `folder`.

    Raises:
        OSError: The cache cannot be written.
    """
    if _damage(folder) is None:
        return folder
    with _locked(folder):
        damage = _damage(folder)
        if damage is None:
            return folder
        if folder.exists():
            log.warning("%s is damaged (%s): it is made again", folder, damage)
        with replaced_folder(folder) as partial:
            partial.mkdir()
            build(partial)
            _write_manifest(partial)
    return folder


def place_of(kind: str, decides: Mapping[str, Any]) -> Path:
    """The place of a result in the cache folder, by all that it depends on: values that JSON takes, or their text."""
    text = json.dumps(decides, sort_keys=True, default=str)
    return cache_folder() / kind / hashlib.sha256(text.encode()).hexdigest()


def remembered(
    folder: Path,
    make: Callable[[], Result],
    *,
    write: Callable[[Path, Result], None],
    read: Callable[[Path], Result],
) -> Result:
    """A result that was made before, read from its place; else made, and written there.

    A cache that cannot be used costs the time of making it, and nothing else.

    Args:
        folder: Its place (`place_of`).
        make: Makes it.
        write: Writes it into a folder.
        read: Reads it from there.
    """
    made: list[Result] = []

    def build(partial: Path) -> None:
        made.append(make())
        write(partial, made[0])

    try:
        cached_folder(folder, build)
        return made[0] if made else read(folder)
    except OSError as error:
        log.info("%s: not kept (%s)", folder, error)
        return made[0] if made else make()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, waiting for other processes as long as it takes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another run that prepares %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write_manifest(folder: Path) -> None:
    """Write the fingerprint of each file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {path.relative_to(folder).as_posix(): _size_and_crc(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _damage(folder: Path) -> str | None:
    """Damage of a cached folder as text; None if it is intact. Files that the manifest does not list are ignored."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not manifest:
            return f"{MANIFEST} lists no files"
        changed = [name for name, expected in manifest.items() if _size_and_crc(folder / name) != expected]
    except (OSError, ValueError, TypeError, RecursionError) as error:  # the manifest itself may be what is damaged
        return str(error)
    return f"changed: {', '.join(changed)}" if changed else None


def _size_and_crc(path: Path) -> str:
    """Size and CRC-32 of a file."""
    found = fingerprint(path)
    return f"{found['bytes']} bytes, crc32 {found['crc32']:08x}"
