"""Atomic files and folders: whole or absent, whatever ends the process or the machine.

Written under a temporary name, synced to the disk, then renamed: a rename is the one change that file systems make as a
whole. Nothing here needs torch.
"""

import errno
import hashlib
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # errors of a full disk
PARTIAL, ASIDE = ".partial", ".old"  # what is being written, and what it replaces
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
UNSYNCABLE = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS}  # SMB, 9p, some of FUSE
CHUNK = 1 << 24  # bytes that are read or written at once
Fingerprint = dict[str, int]  # "bytes" and "crc32" of a file
_unsynced: set[int] = set()  # file systems that cannot sync, of which a warning has told


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Write a file that takes the place of `path` when all of it is on the disk; an error leaves `path` as it was."""
    partial = _partial(path)
    try:
        with partial.open("xb") as file:  # x: never through a link
            yield file
            file.flush()
            _sync(file.fileno(), path.parent)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # the error before matters more
            partial.unlink()
        raise


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder that takes the place of `folder` when all of it is on the disk; an error leaves `folder` as it was.

    What was there is renamed aside before and removed after, so that a kill between the two renames loses neither; the
    next call returns it. A link is replaced, and what it points to stays. Files get the mode of new files.

    Yields:
        The temporary folder, which is absent: make it, and write the files there.
    """
    partial, aside = _partial(folder), folder.with_name(folder.name + ASIDE)
    if os.path.lexists(aside) and not os.path.lexists(folder):
        os.replace(aside, folder)
    remove(aside)
    try:
        yield partial
        mode = 0o666 & ~_umask()
        for path in (*partial.rglob("*"), partial):
            if path.is_dir():
                sync_folder(path)
            else:
                with suppress(OSError):  # a file system without modes
                    path.chmod(mode)  # safetensors makes files that only their owner can read
                with path.open("rb+" if sys.platform == "win32" else "rb") as file:  # Windows syncs what can be written
                    _sync(file.fileno(), path.parent)
        if os.path.lexists(folder):
            os.replace(folder, aside)
        os.replace(partial, folder)
        sync_folder(folder.parent)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(folder):
            os.replace(aside, folder)
        raise
    finally:
        with suppress(OSError):  # a file that another program has open
            remove(partial)
            remove(aside)


def remove(path: Path) -> None:
    """Remove what is at `path`: a file, a folder with all in it, or a link, but not what it points to; or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder where none is, in place of a file or a link that leads nowhere."""
    if not path.is_dir():
        remove(path)
        path.mkdir(parents=True)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk, where its file system can do that."""
    if sys.platform == "win32":
        return  # Windows cannot open folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor, folder)
    finally:
        os.close(descriptor)


def _sync(descriptor: int, folder: Path) -> None:
    """Sync what is open to the disk; a file system that cannot is told of once."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSYNCABLE:
            raise
        device = folder.stat().st_dev
        if device not in _unsynced:
            _unsynced.add(device)
            lost = "a power loss may cost more than the last window"
            log.warning("%s: its file system cannot sync what is written (%s); %s", folder, error.strerror, lost)


def _partial(path: Path) -> Path:
    """The temporary name of what will be at `path`; what a killed process, or anybody, left there is removed."""
    partial = path.with_name(path.name + PARTIAL)
    remove(partial)
    return partial


def _umask() -> int:
    """The permissions that new files do not get; it can only be read by setting it, here to none for others."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def chunks(path: Path) -> Iterator[memoryview]:
    """Bytes of a file, CHUNK at a time; each part is valid until the next."""
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    for chunk in chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def fingerprint(path: Path) -> Fingerprint:
    """Size and CRC-32 of a file."""
    size, checksum = 0, 0
    for chunk in chunks(path):
        size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return {"bytes": size, "crc32": checksum}


def can_link(folder: Path) -> bool:
    """Whether the file system of a folder has hard links; if not, `publish` copies."""
    first, second = folder / f"lit_recon.first{PARTIAL}", folder / f"lit_recon.second{PARTIAL}"
    try:
        for path in (first, second):
            remove(path)  # left by a process that was killed
        first.touch()
        os.link(first, second)
    except OSError:
        return False
    finally:
        for path in (first, second):
            with suppress(OSError):
                remove(path)
    return True


def publish(source: Path, target: Path) -> None:
    """Put the content of `source` at `target` as well, atomically.

    Both names are the same file where the file system has hard links, so change neither of them in place.
    """
    partial = _partial(target)
    try:
        os.link(source, partial)
    except OSError:  # another file system, or one without links
        with replaced(target) as file:
            for chunk in chunks(source):
                file.write(chunk)
        return
    try:
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)  # also after success: a rename of a file over itself does nothing
