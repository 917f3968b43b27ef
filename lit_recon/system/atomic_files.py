"""Files that are whole or not there, whatever ends the process or the machine: written aside, synced, then renamed."""

import errno
import json
import mmap
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import torch
from torch import Tensor

FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # what a full disk answers
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
CHUNK = 1 << 24  # bytes that are read or written at once
DTYPES = {  # in the words of the safetensors format
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_UNTRACKED: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
Fingerprint = dict[str, int]  # "bytes" and "crc32" of a file


def memory_map(file: BinaryIO, length: int, **settings: Any) -> mmap.mmap:
    """A map of a file, which holds no descriptor of it open from Python 3.13 on."""
    return mmap.mmap(file.fileno(), length, **settings, **_UNTRACKED)


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


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Fingerprint:
    """Write the safetensors format (length of the header, header, content) in chunks, with its checksum on the way.

    safetensors' own save_file copies everything in older versions, refuses tensors that share memory, and tells of a
    full disk in words only.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # each starts at its alignment
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor, end = tensors[name], offset + tensors[name].nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    size, checksum = 0, 0
    for chunk in _chunks(len(header).to_bytes(8, "little") + header, [tensors[name] for name in names]):
        file.write(chunk)
        size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return {"bytes": size, "crc32": checksum}


def _chunks(header: bytes, tensors: Sequence[Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a file, a few at a time."""
    yield header
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)  # a copy only if it must be
        if flat.stride() != (1,):
            flat = flat.clone(memory_format=torch.contiguous_format)
        for part in flat.split(max(1, CHUNK // flat.element_size())) if len(flat) else ():
            yield memoryview(part.cpu().view(torch.uint8).numpy())


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
