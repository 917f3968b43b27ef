"""Atomic files and folders: whole or absent, whatever ends the process or the machine.

Written under a temporary name, synced to the disk, then renamed: a rename is the one change that file systems make as a
whole. Nothing here needs torch.
"""

import errno
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # errors of a full disk
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
CHUNK = 1 << 24  # bytes that are read or written at once
Fingerprint = dict[str, int]  # "bytes" and "crc32" of a file


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Write a file that takes the place of `path` when all of it is on the disk; an error leaves `path` as it was."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # the error before matters more
            partial.unlink()
        raise


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder that takes the place of `folder` when all of it is on the disk; an error leaves nothing of it.

    Yields:
        The temporary folder, which is absent: make it, and write the files there.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        yield partial
        for path in (partial, *partial.rglob("*")):
            if path.is_dir():
                sync_folder(path)
            else:
                with path.open("rb+" if sys.platform == "win32" else "rb") as file:  # Windows syncs what can be written
                    os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk."""
    if sys.platform == "win32":
        return  # Windows cannot open folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def chunks(path: Path) -> Iterator[memoryview]:
    """Bytes of a file, CHUNK at a time; each part is valid until the next."""
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def fingerprint(path: Path) -> Fingerprint:
    """Size and CRC-32 of a file."""
    size, checksum = 0, 0
    for chunk in chunks(path):
        size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return {"bytes": size, "crc32": checksum}


def can_link(folder: Path) -> bool:
    """Whether the file system of a folder has hard links; if not, `publish` copies."""
    with TemporaryDirectory(dir=folder) as scratch:
        first, second = Path(scratch, "first"), Path(scratch, "second")
        first.touch()
        try:
            os.link(first, second)
        except OSError:
            return False
    return True


def publish(source: Path, target: Path) -> None:
    """Put the content of `source` at `target` as well, atomically.

    Both names are the same file where the file system has hard links, so change neither of them in place.
    """
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        try:
            os.link(source, partial)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)  # also after success: a rename of a file over itself does nothing
