"""Files that are whole or not there, whatever ends the process or the machine: written aside, synced, then renamed."""

import errno
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # what a full disk answers
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
CHUNK = 1 << 24  # bytes that are read or written at once
Fingerprint = dict[str, int]  # "bytes" and "crc32" of a file


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when all is written and on the disk; otherwise nothing of it stays."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # what went wrong before is what matters
            partial.unlink()
        raise


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A folder that takes the place of `folder` when all is in it and on the disk; otherwise nothing of it stays."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        yield partial
        for path in (partial, *partial.rglob("*")):
            if path.is_dir():
                sync_folder(path)
            else:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    if os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def chunks(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, some at a time, each part valid until the next."""
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
    """Whether files in a folder can have second names, or `publish` must copy them."""
    with TemporaryDirectory(dir=folder) as scratch:
        first, second = Path(scratch, "first"), Path(scratch, "second")
        first.touch()
        try:
            os.link(first, second)
        except OSError:
            return False
    return True


def publish(source: Path, target: Path) -> None:
    """Have the content of `source` at `target` too, from one moment to the next.

    It is the same file under a second name where the file system can do that, so change neither of them in place.
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
