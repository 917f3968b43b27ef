"""Tensors in safetensors files, written in chunks, and memory maps of files."""

import json
import mmap
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lit_recon.system.atomic_files import CHUNK, Fingerprint

DTYPE_NAMES = {  # names of the safetensors format
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
_OPEN_FILES = 4096  # more than any model has layers
_OF_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def memory_map(file: BinaryIO, length: int, **settings: Any) -> mmap.mmap:
    """Memory map of a file; from Python 3.13 on it does not keep a file descriptor open, except on Windows."""
    if sys.version_info >= (3, 13) and sys.platform != "win32":
        settings["trackfd"] = False
    return mmap.mmap(file.fileno(), length, **settings)


def allow_open_files() -> None:
    """Allow this process more open files where the system lets it: each map may keep one, and a layer is a map."""
    if sys.platform == "win32":
        return
    import resource  # not at the top: Windows has no such module

    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(_OPEN_FILES, most)
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def write_tensors(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    make: Callable[[str], Tensor] | None = None,
) -> Fingerprint:
    """Write the safetensors format (length of the header, header, content) in chunks, and compute its checksum.

    save_file of the safetensors library copies everything in older versions, refuses tensors that share memory, and
    reports a full disk by its message only, without an errno.

    Args:
        file: The file, at its start.
        tensors: Tensors by name, of any device and any strides.
        metadata: Texts for the header.
        make: Makes a tensor by its name when its turn comes, one at a time; `tensors` then only tell types and shapes.

    Returns:
        Size and CRC-32 of what was written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all are aligned
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor, end = tensors[name], offset + tensors[name].nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()  # as safetensors itself writes it
    header += b" " * (-len(header) % 8)
    start = len(header).to_bytes(8, "little") + header
    file.write(start)
    checksum = zlib.crc32(start)
    for name in names:
        checksum = _append(file, make(name) if make else tensors[name], checksum)
    return {"bytes": len(start) + offset, "crc32": checksum}


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file that `write_tensors` wrote, in a map that may be larger than the memory.

    Look at them only: the map can be read, not written, since Linux refuses one that could be changed where the file is
    larger than memory and swap. Writing to them ends the process.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        mapping = memory_map(file, 0, access=mmap.ACCESS_READ)
    header.pop("__metadata__", None)
    tensors = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        for name, entry in header.items():
            dtype, (start, stop) = _OF_NAME[entry["dtype"]], entry["data_offsets"]
            count = (stop - start) // dtype.itemsize
            flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=8 + length + start) if count else None
            tensors[name] = (torch.empty(0, dtype=dtype) if flat is None else flat).view(entry["shape"])
    return tensors


def _append(file: BinaryIO, tensor: Tensor, checksum: int) -> int:
    """Write a tensor's bytes, CHUNK at a time; return the checksum with them. No reference to the tensor stays."""
    flat = tensor.detach().reshape(-1)  # a copy only if it must be
    if flat.stride() != (1,):
        flat = flat.clone(memory_format=torch.contiguous_format)
    for part in flat.split(max(1, CHUNK // flat.element_size())) if len(flat) else ():
        chunk = memoryview(part.cpu().view(torch.uint8).numpy())
        file.write(chunk)
        checksum = zlib.crc32(chunk, checksum)
    return checksum
