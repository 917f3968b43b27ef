"""The dense checkpoint on disk: which files it is, what lies where in them, and whether it is still the same.

Tensors of safetensors files are mapped into memory instead of being read. A model whose parameters are named and typed
as the files' tensors are costs no memory of its own: its pages come from the files when they are looked at, and go when
memory is short.
"""

import errno
import json
import math
import mmap
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from lit_recon.model.decoder import decoder_layers
from lit_recon.system.tensor_files import DTYPE_NAMES, memory_map

# In the order in which transformers looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_OF_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_AHEAD = 2**20  # bytes
_RUN = 2**28  # bytes that may be mapped at once in a small model
_LENGTH = 8  # bytes of a safetensors file that tell how long its header is
_FILE_NAME = re.compile(r"[^/\\\0]{1,255}")
_SAID = 80  # characters of what is wrong in a file that a message repeats


def folder_problems(folder: Path) -> list[str]:
    """What keeps a folder from being a complete model, as far as the names and headers of its files tell."""
    names = sorted(path.name for path in folder.iterdir())
    problems = [] if "config.json" in names else ["no config.json"]
    weights = next((name for name in WEIGHTS if name in names), None)
    problems += weight_problems(folder, weights) if weights else [f"no weights ({', '.join(WEIGHTS)})"]
    if not set(VOCABULARIES) & set(names) and not list(folder.glob("*.tiktoken")):
        problems.append(f"no tokenizer ({', '.join(VOCABULARIES)})")
    if problems:
        problems.append(f"it holds {', '.join(names[:12]) or 'nothing'}{', ...' if len(names) > 12 else ''}")
    return problems


def weight_problems(folder: Path, weights: str) -> list[str]:
    """Files that a weight index lists and the folder lacks, and safetensors files that do not fit their own header."""
    try:
        files = listed_files(folder / weights) if weights.endswith(".index.json") else [weights]
    except ValueError as error:
        return [str(error)]
    problems = []
    for name in files:
        if not (folder / name).is_file():
            problems.append(f"no {name}, which {weights} lists")
        elif name.endswith(".safetensors"):
            try:
                DenseFiles([folder / name])
            except ValueError as error:
                problems.append(str(error))
    return problems


def num_tensors(folder: Path) -> int:
    """How many tensors the weights of a complete model folder can hold at most, as headers and sizes tell."""
    weights = next(name for name in WEIGHTS if (folder / name).is_file())
    names = listed_files(folder / weights) if weights.endswith(".index.json") else [weights]
    files = [folder / name for name in names]
    if all(path.suffix == ".safetensors" for path in files):
        return len(DenseFiles(files).names)
    return sum(path.stat().st_size for path in files)  # a byte each


def listed_files(index: Path) -> list[str]:
    """Names of the files that an index of weights (*.index.json) lists, all of them next to it.

    Raises:
        ValueError: It is no such index, or names a file elsewhere.
    """
    try:
        names = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index.name} is not an index of weights ({str(error)[:_SAID]!r})") from error
    for name in names:
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or name in (".", ".."):
            raise ValueError(
                f"{index.name} lists {str(name)[:_SAID]!r} as a file of weights; expected a name in its own folder"
            )
    if not names:
        raise ValueError(f"{index.name} lists no files")
    return sorted(set(names))


def checkpoint_files(source: str, revision: str | None, names: Sequence[str]) -> list[Path]:
    """The files that hold a model's weights, the first that exists of `names` and what it lists, once loaded.

    Args:
        source: Hub id or folder.
        revision: Of a Hub model.
        names: Names of single files, and of indices (*.index.json).
    """
    for name in names:
        found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is None:
            continue
        if not name.endswith(".index.json"):
            return [Path(found)]
        return [Path(str(cached_file(source, file, revision=revision))) for file in listed_files(Path(found))]
    return []


class _Entry(NamedTuple):
    """Where a tensor lies, and what it is in the words of the format."""

    path: Path
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    name: str  # of two empty tensors at one place, each is itself

    @property
    def stop(self) -> int:
        """The byte after its last."""
        return self.start + self.nbytes


def _entries(path: Path) -> dict[str, _Entry]:
    """What the header of a safetensors file (its length, JSON, then the tensors) says of its tensors.

    Raises:
        ValueError: It is no such file, or not all of it is there.
    """
    try:
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(_LENGTH), "little"), path.stat().st_size
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no table of tensors")
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, about, _LENGTH + length) for name, about in header.items()}
        end = max((entry.stop for entry in entries.values()), default=_LENGTH + length)
        if end != size:
            raise ValueError(f"its header speaks of {end} bytes, and it has {size}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is cut short, damaged or a Git LFS pointer ({error})") from error
    return entries


def _entry(path: Path, name: str, about: Any, content: int) -> _Entry:
    """Where a tensor lies, by what the header of its file says `about` it.

    Args:
        path: The file.
        name: The tensor's name.
        about: Its type, shape, and the offsets of its first byte and of the byte after its last.
        content: The byte from which offsets are counted.

    Raises:
        ValueError: They do not describe a tensor.
    """
    try:
        dtype, shape, (start, stop) = about["dtype"], about["shape"], about["data_offsets"]
        numbers = [start, stop, *shape]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name[:_SAID]!r} lacks a type, a shape or offsets") from error
    is_right = isinstance(dtype, str) and all(type(number) is int and number >= 0 for number in numbers)
    itemsize = _OF_NAME[dtype].itemsize if is_right and dtype in _OF_NAME else None
    if not is_right or start > stop or (itemsize and math.prod(shape) * itemsize != stop - start):
        said = f"{str(dtype)[:_SAID]} {str(shape)[:_SAID]} in the bytes {str(start)[:_SAID]} to {str(stop)[:_SAID]}"
        raise ValueError(f"{name[:_SAID]!r} cannot be {said}")
    return _Entry(path, content + start, stop - start, dtype, tuple(shape), name)


def _stamp(path: Path) -> tuple[int, ...]:
    """Size of a file and when it was written last; nothing of one that is gone."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return ()
    return about.st_size, about.st_mtime_ns


def _runs(entries: Collection[_Entry]) -> Iterator[list[_Entry]]:
    """The tensors that follow each other in a file; of a large model some hundred runs, each far below the memory."""
    run: list[_Entry] = []
    bound = max(_RUN, sum(entry.nbytes for entry in entries) // 64)
    for entry in sorted(entries, key=lambda entry: (entry.path, entry.start)):
        follows = run and entry.path == run[-1].path and entry.start == run[-1].stop
        if not follows or entry.stop - run[0].start > bound:
            if run:
                yield run
            run = []
        run.append(entry)
    if run:
        yield run


def _mapped(run: Sequence[_Entry]) -> Iterator[Tensor]:
    """Tensors that follow each other, in one copy-on-write map of their bytes."""
    first = run[0].start - run[0].start % mmap.ALLOCATIONGRANULARITY
    try:
        with run[0].path.open("rb") as file:
            mapping = memory_map(file, max(1, run[-1].stop - first), access=mmap.ACCESS_COPY, offset=first)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise ValueError(
            f"{run[0].path.name}: the system lets this process have too few files open at once for the model; allow "
            "more, for example with: ulimit -n 4096"
        ) from error
    for entry in run:
        if entry.dtype not in _OF_NAME:
            raise ValueError(f"{entry.path.name}: tensors of type {entry.dtype} cannot be read")
        dtype = _OF_NAME[entry.dtype]
        if not entry.nbytes:
            yield torch.empty(entry.shape, dtype=dtype)
            continue
        offset, aligned = entry.start - first, not entry.start % dtype.itemsize
        kind, count = (dtype, entry.nbytes // dtype.itemsize) if aligned else (torch.uint8, entry.nbytes)
        tensor = torch.frombuffer(mapping, dtype=kind, count=count, offset=offset)
        yield (tensor if aligned else tensor.clone().view(dtype)).view(entry.shape)


class DenseFiles:
    """The safetensors files of a dense checkpoint, whose tensors are named as the model's parameters are.

    Args:
        files: The files.
        renamed: Names in the model of tensors that have others in the files.

    Raises:
        ValueError: One is not a safetensors file, or not all of it is there.
    """

    def __init__(self, files: Sequence[Path], renamed: Mapping[str, str] | None = None) -> None:
        self._entries = {name: entry for path in files for name, entry in _entries(path).items()}
        self._stamps = {path: _stamp(path) for path in files}
        if renamed:
            self._entries = {
                renamed.get(name, name): entry._replace(name=renamed.get(name, name))
                for name, entry in self._entries.items()
            }

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type of a tensor, in the words of the format ("BF16"), and its shape; nothing is mapped."""
        entry = self._entries[name]
        return entry.dtype, entry.shape

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(entry.nbytes for entry in self._entries.values())

    def changed(self) -> list[str]:
        """What has happened to the files since they were opened: what is mapped of them has changed with them."""
        now = {path: _stamp(path) for path in self._stamps}
        return [
            f"{path} is gone"
            if not now[path]
            else f"{path} had {stamp[0]} bytes and has {now[path][0]}, or was written to"
            for path, stamp in self._stamps.items()
            if now[path] != stamp
        ]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors, those that follow each other in a map that goes with them; changing them never changes the file.

        safetensors maps whole files, header first: with one map per layer, what the system reads around each header
        adds up to half a model, and Linux refuses to map a file that is larger than memory and swap. One map per tensor
        would be more than the open files that systems allow a process.
        """
        wanted = {name: self._entries[name] for name in names}
        pairs = (pair for run in _runs(wanted.values()) for pair in zip(run, _mapped(run), strict=True))
        found = {entry.name: tensor for entry, tensor in pairs}
        return {name: found[name] for name in wanted}

    def same(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The names under which the files have tensors of the same type and shape as these."""
        return [name for name, tensor in tensors.items() if self._difference(name, tensor) is None]

    def _difference(self, name: str, tensor: Tensor) -> str | None:
        """Why a tensor of the model cannot be mapped from the files."""
        stored = self._entries.get(name)
        if stored is None:
            return f"its files have no {name}: transformers converts them when it loads them"
        if stored.dtype not in _OF_NAME or stored.start % tensor.element_size():
            return f"{name} is stored in a form that cannot be mapped ({stored.dtype} at byte {stored.start})"
        kind = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
        if (stored.dtype, stored.shape) != kind:
            return f"{name} is {stored.dtype} {stored.shape} in its files and {kind[0]} {kind[1]} in the model"
        return None

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system read tensors into its cache in the background, where it can be asked to."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            entry = self._entries[name]
            with entry.path.open("rb") as file:
                for start in range(0, entry.nbytes, _AHEAD):  # of more, Linux reads what one request holds
                    os.posix_fadvise(file.fileno(), entry.start + start, _AHEAD, os.POSIX_FADV_WILLNEED)

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, files: Sequence[Path], renamed: Mapping[str, str] | None = None
    ) -> "DenseFiles | str":
        """The files of a loaded model where each tensor of its layers is one of theirs; otherwise what is not."""
        if not files or any(path.suffix != ".safetensors" for path in files):
            return "its weights are not in safetensors files"
        dense = cls(files, renamed)
        prefix, layers = decoder_layers(model)
        for index, layer in enumerate(layers):
            for name, tensor in layer_state(layer, f"{prefix}.{index}").items():
                if difference := dense._difference(name, tensor):
                    return difference
        return dense


def layer_state(layer: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The tensors of a layer by their names in the model."""
    return {f"{prefix}.{name}": tensor for name, tensor in layer.state_dict().items()}


def point_at(module: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Have these tensors, by their names in the model, in place of those of a module whose name is `prefix`."""
    for name, tensor in tensors.items():
        parent, _, leaf = name.removeprefix(f"{prefix}.").rpartition(".")
        getattr(module.get_submodule(parent), leaf).data = tensor
