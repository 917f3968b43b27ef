"""The checkpoint of a run, a Hugging Face folder: written whole, or growing with the walk.

The growing one has a shard per layer and is whole at every moment. It starts as a copy of the dense checkpoint. Each
finished layer replaces its shard by one rename, so that a run that ends early, however it ends, leaves a model that
loads: pruned and reconstructed as far as it came, dense from there.
"""

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_recon.model.decoder import decoder_layers
from lit_recon.model.mapped_files import DenseFiles, layer_state
from lit_recon.system.atomic_files import publish, remove, replaced, replaced_folder
from lit_recon.system.quiet_libraries import no_progress_bars
from lit_recon.system.tensor_files import write_tensors

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Companions:
    """What a checkpoint has from the dense model besides its weights and configuration.

    Attributes:
        tokenizer: Its tokenizer.
        files: Small files of its folder, by name: licence, processor, code of its own.
        tensors: Tensors of its files that transformers leaves out; a growing checkpoint copies all of its files anyway.
    """

    tokenizer: PreTrainedTokenizerBase
    files: Mapping[str, bytes] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def save_pretrained(self, folder: Path) -> None:
        """Write them next to what is there, which stays; code that the folder then lacks is not spoken of in it."""
        for name, content in self.files.items():
            if not (folder / name).exists():
                (folder / name).write_bytes(content)
        self.tokenizer.save_pretrained(folder)
        for path in folder.glob("*config.json"):
            said = json.loads(path.read_text(encoding="utf-8"))
            if "auto_map" in said and not all(_has_code(folder, one) for one in said.pop("auto_map").values()):
                path.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_whole(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | Companions, card: str
) -> None:
    """Write a model that is in memory, its tokenizer and a model card as a Hugging Face folder, all at once.

    Raises:
        OSError: The disk is full, for example.
    """
    with replaced_folder(folder) as partial:
        try:
            with no_progress_bars():
                model.save_pretrained(partial)
        except SafetensorError as error:  # it says of a full disk only in words what the system's number is
            number = re.search(r"(?:os error |Os { code: )(\d+)", str(error))  # the latter: safetensors 0.4
            raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else error from error
        if isinstance(tokenizer, Companions) and tokenizer.tensors:
            _add_shard(partial, tokenizer.tensors)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")


class ShardedFolder:
    """A Hugging Face folder with a shard per layer, and one for all else.

    Args:
        folder: Where it lies.
        model: The dense model.
        files: The files that it was loaded from.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, files: DenseFiles) -> None:
        self.folder, self.model, self.files = folder, model, files
        prefix, layers = decoder_layers(model)
        self._names = [list(layer_state(layer, f"{prefix}.{index}")) for index, layer in enumerate(layers)]

    def is_there(self) -> bool:
        """Whether the folder has all shards and their index; a run that was not streamed leaves other files."""
        shards = (self._shard(index) for index in range(-1, len(self._names)))
        return all((self.folder / name).is_file() for name in (INDEX, *shards))

    def start(self, tokenizer: PreTrainedTokenizerBase | Companions, card: str) -> None:
        """Write the dense model, its tokenizer and a card, all at once, in place of what is there."""
        with replaced_folder(self.folder) as partial:
            self._write_companions(partial, tokenizer)
            for shard, names in self._shards().items():
                self._save(partial / shard, names)
            _write_text(partial / INDEX, self._index())
            _write_text(partial / "README.md", card)

    def mend(self, tokenizer: PreTrainedTokenizerBase | Companions, done: Collection[int]) -> None:
        """Return all but the shards of the layers that are `done` to what `start` wrote: they may have been changed."""
        scratch = self.folder.with_name(f"{self.folder.name}.partial")
        remove(scratch)  # left by a process that was killed
        scratch.mkdir()
        self._write_companions(scratch, tokenizer)
        _write_text(scratch / INDEX, self._index())
        for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
            target = self.folder / path.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            with replaced(target) as file:  # which syncs it
                file.write(path.read_bytes())
        remove(scratch)
        of_done = {self._shard(index) for index in done}
        for shard, names in self._shards().items():
            if shard not in of_done and not self._is_dense(self.folder / shard, names):
                self._save(self.folder / shard, names)

    def put(self, index: int, source: Path) -> None:
        """Publish a finished layer's file as its shard."""
        publish(source, self.folder / self._shard(index))

    def describe(self, card: str) -> None:
        """Replace the model card."""
        _write_text(self.folder / "README.md", card)

    def _write_companions(self, folder: Path, tokenizer: PreTrainedTokenizerBase | Companions) -> None:
        """What is in a checkpoint besides its weights."""
        self.model.config.save_pretrained(folder)
        if self.model.can_generate() and self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def _shards(self) -> dict[str, Sequence[str]]:
        """The names of each shard's tensors."""
        of_layers = {name for names in self._names for name in names}
        rest = [name for name in self.files.names if name not in of_layers]
        shards: dict[str, Sequence[str]] = {self._shard(-1): rest}
        return shards | {self._shard(index): names for index, names in enumerate(self._names)}

    def _index(self) -> str:
        return _index_of(self._shards(), self.files.nbytes)

    def _is_dense(self, path: Path, names: Sequence[str]) -> bool:
        """Whether a shard holds just the dense weights."""
        try:
            with safe_open(path, framework="pt") as file:
                return {*file.keys()} == {*names} and all(
                    _same(file.get_tensor(name), tensor) for name, tensor in self.files.tensors(names).items()
                )
        except (OSError, SafetensorError):
            return False

    def _save(self, path: Path, names: Sequence[str]) -> None:
        with replaced(path) as file:
            write_tensors(file, self.files.tensors(names), {"format": "pt"})

    def _shard(self, index: int) -> str:
        """File name of a layer's shard; -1: of all that is not in a layer."""
        return f"model-{index + 2:05}-of-{len(self._names) + 1:05}.safetensors"


def _has_code(folder: Path, references: Any) -> bool:
    """Whether the files are there that an entry of auto_map names: file.Class, or one of another repository."""
    named = [name for name in (references if isinstance(references, list) else [references]) if name]
    return all("--" in name or (folder / f"{name.partition('.')[0]}.py").is_file() for name in named)


def _add_shard(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors that are not the model's into a folder with a saved model."""
    single = folder / "model.safetensors"
    if single.exists():  # it would be read alone
        single.rename(folder / "model-00001-of-00001.safetensors")
    with replaced(folder / "left_out.safetensors") as file:
        write_tensors(file, tensors, {"format": "pt"})
    files = {path.name: DenseFiles([path]) for path in sorted(folder.glob("*.safetensors"))}
    shards = {name: found.names for name, found in files.items()}
    _write_text(folder / INDEX, _index_of(shards, sum(found.nbytes for found in files.values())))


def _index_of(shards: Mapping[str, Sequence[str]], nbytes: int) -> str:
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    return json.dumps({"metadata": {"total_size": nbytes}, "weight_map": weight_map}, indent=2) + "\n"


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def _write_text(path: Path, text: str) -> None:
    with replaced(path) as file:
        file.write(text.encode())
