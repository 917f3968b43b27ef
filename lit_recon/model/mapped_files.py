"""The dense checkpoint on disk: which files it is, what lies where in them, and whether it is still the same.

Tensors of safetensors files are mapped into memory instead of being read. A model whose parameters are named and typed
as the files' tensors are costs no memory of its own: its pages come from the files when they are looked at, and go when
memory is short.
"""

import json
import mmap
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from lit_recon.model.decoder import decoder_layers
from lit_recon.system.tensor_files import DTYPES, memory_map

# In the order in which transformers looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}
_AHEAD = 2**20  # bytes
_RUN = 2**28  # bytes that may be mapped at once in a small model
_LENGTH = 8  # bytes of a safetensors file that tell how long its header is


def folder_problems(folder: Path) -> list[str]:
    """What keeps a folder from being a complete model, as far as the names and headers of its files tell."""
    names = sorted(path.name for path in folder.iterdir())
    problems = [] if "config.json" in names else ["no config.json"]
    weights = next((name for name in WEIGHTS if name in names), None)
    problems += _weight_problems(folder, weights) if weights else [f"no weights ({', '.join(WEIGHTS)})"]
    if not set(VOCABULARIES) & set(names) and not list(folder.glob("*.tiktoken")):
        problems.append(f"no tokenizer ({', '.join(VOCABULARIES)})")
    if problems:
        problems.append(f"it holds {', '.join(names[:12]) or 'nothing'}{', ...' if len(names) > 12 else ''}")
    return problems


def _weight_problems(folder: Path, weights: str) -> list[str]:
    """Files that a weight index lists and the folder lacks, and safetensors files that do not fit their own header."""
    files = [weights]
    if weights.endswith(".index.json"):
        try:
            files = sorted(set(json.loads((folder / weights).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError) as error:
            return [f"{weights} is not an index of weights ({error!r})"]
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
        listed = sorted(set(json.loads(Path(found).read_text(encoding="utf-8"))["weight_map"].values()))
        return [Path(str(cached_file(source, file, revision=revision))) for file in listed]
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
            length = int.from_bytes(file.read(_LENGTH), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {
            name: _Entry(path, _LENGTH + length + start, stop - start, entry["dtype"], tuple(entry["shape"]), name)
            for name, entry in header.items()
            for start, stop in [entry["data_offsets"]]
        }
        size = max((entry.stop for entry in entries.values()), default=_LENGTH + length)
        if size != path.stat().st_size:
            raise ValueError(f"its header speaks of {size} bytes, and it has {path.stat().st_size}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is cut short, damaged or a Git LFS pointer ({error})") from error
    return entries


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
    with run[0].path.open("rb") as file:
        mapping = memory_map(file, max(1, run[-1].stop - first), access=mmap.ACCESS_COPY, offset=first)
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
        if renamed:
            self._entries = {
                renamed.get(name, name): entry._replace(name=renamed.get(name, name))
                for name, entry in self._entries.items()
            }

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(entry.nbytes for entry in self._entries.values())

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
        kind = DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
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
