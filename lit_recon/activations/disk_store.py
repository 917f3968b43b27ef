"""Arrays in memory-mapped files.

A file is as large as it will ever be before anything is written to it: a full disk is an error when an array is made,
not a crash when one is written to. It goes when its array goes, at the latest when the store is closed.

Shapes: S samples, T tokens, D hidden size.
"""

import math
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor

from lit_recon.system.atomic_files import FULL, make_folder, remove
from lit_recon.system.tensor_files import memory_map
from lit_recon.system.transfer import moved
from lit_recon.system.units import in_gb

SUFFIX = ".states"  # of the files
_CHUNK = 2**20  # bytes written at once where a file cannot be allocated by its size
Rows = slice | Sequence[int]


class Needed(NamedTuple):
    """Bytes that the arrays of a run take.

    Attributes:
        memory: Of the CPU.
        disk: On the disk.
        device: Of a GPU.
    """

    memory: int
    disk: int
    device: int = 0


class DiskStore:
    """Arrays in memory-mapped files.

    Args:
        folder: Where they go; what a killed run left there is removed.
        dtype: Type of the arrays.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.folder, self.dtype = folder, dtype
        self.device = torch.device("cpu")
        self._mappings: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by the address of the array
        self._made = 0
        self._remove_files()

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """A new array.

        Raises:
            OSError: The disk is full.
        """
        make_folder(self.folder)
        path = self.folder / f"{self._made}{SUFFIX}"
        self._made += 1
        size = math.prod(shape) * self.dtype.itemsize
        try:
            with path.open("w+b") as file:
                _allocate(file.fileno(), size)
                mapping = memory_map(file, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise _explained(error, self.folder, size) from error
        finalize(mapping, path.unlink, missing_ok=True)
        array = torch.frombuffer(mapping, dtype=self.dtype).view(*shape)  # keeps the mapping alive
        self._mappings[array.untyped_storage().data_ptr()] = mapping
        return array

    def prefetch(self, array_STD: Tensor, rows: Rows) -> None:
        """Have the system read some samples into its cache, without waiting for it."""
        self._advise(array_STD, rows, "MADV_WILLNEED")

    def release(self, array_STD: Tensor, rows: Rows) -> None:
        """Take some samples out of this process's memory; they stay in the system's cache as long as it has room."""
        self._advise(array_STD, rows, "MADV_DONTNEED")  # of a shared mapping of a file: nothing written is lost

    def load(self, array_STD: Tensor, rows: Rows, device: torch.device) -> Tensor:
        """Some samples on a device, in float32."""
        return moved(array_STD[rows], device).float()

    def settle(self) -> None:
        """Nothing to do."""

    def _advise(self, array_STD: Tensor, rows: Rows, advice: str) -> None:
        """Pass advice on, where the system takes it and the array is one of this store."""
        mapping = self._mappings.get(array_STD.untyped_storage().data_ptr())
        if mapping is None or not hasattr(mmap, advice):
            return
        sample, offset = array_STD[0].nbytes, int(array_STD.storage_offset()) * array_STD.itemsize
        for first, last in _ranges(rows, len(array_STD)):
            start = (offset + first * sample) // mmap.PAGESIZE * mmap.PAGESIZE
            mapping.madvise(getattr(mmap, advice), start, offset + last * sample - start)

    def needed(self, shape: Sequence[int], count: int) -> Needed:
        """Bytes that `count` arrays of a shape take."""
        return Needed(memory=0, disk=count * math.prod(shape) * self.dtype.itemsize)

    def close(self) -> None:
        """Remove all files; arrays that are still referred to stay readable."""
        self._remove_files()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            remove(self.folder)  # or a link to it

    def _remove_files(self) -> None:
        for path in self.folder.glob(f"*{SUFFIX}"):
            path.unlink(missing_ok=True)

    def __enter__(self) -> "DiskStore":
        """The store, closed at the end of the context."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def _ranges(rows: Rows, total: int) -> Iterator[tuple[int, int]]:
    """First sample and the one after the last, of each run of consecutive samples."""
    if isinstance(rows, slice):
        first, last, _ = rows.indices(total)
        if first < last:
            yield first, last
    else:
        for row in rows:
            yield row, row + 1


def _allocate(descriptor: int, size: int) -> None:
    """Give an empty file its size in blocks that are really there."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    for start in range(0, size, _CHUNK):
        os.write(descriptor, bytes(min(_CHUNK, size - start)))


def _explained(error: OSError, folder: Path, size: int) -> OSError:
    """The error with what can be done about it, if it is a full disk."""
    if error.errno not in FULL:
        return error
    return OSError(
        error.errno,
        f"the disk is full: {folder} needs {in_gb(size)} more for activations and has {in_gb(free_space(folder))}. "
        "Free some space, or use store=memory, store.targets=recompute or fewer samples (data.num_samples)",
    )


def free_space(folder: Path) -> int:
    """Free bytes on the disk of a folder that need not exist yet."""
    return shutil.disk_usage(nearest(folder)).free


def nearest(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
