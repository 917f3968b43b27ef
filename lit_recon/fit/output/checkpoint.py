"""The checkpoint of a run, a Hugging Face folder: written whole, or growing with the walk.

The growing one has a shard per layer and is whole at every moment. It starts as a copy of the dense checkpoint. Each
finished layer replaces its shard by one rename, so that a run that ends early, however it ends, leaves a model that
loads: pruned and reconstructed as far as it came, dense from there.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_recon.model.decoder import decoder_layers
from lit_recon.model.mapped_files import DenseFiles, layer_state
from lit_recon.system.atomic_files import publish, replaced, replaced_folder
from lit_recon.system.quiet_libraries import no_progress_bars
from lit_recon.system.tensor_files import write_tensors

INDEX = "model.safetensors.index.json"


def save_whole(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
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

    def start(self, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
        """Write the dense model, its tokenizer and a card, all at once, in place of what is there."""
        with replaced_folder(self.folder) as partial:
            self.model.config.save_pretrained(partial)
            if self.model.can_generate() and self.model.generation_config is not None:
                self.model.generation_config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            self._write_dense(partial)
            _write_text(partial / "README.md", card)

    def put(self, index: int, source: Path) -> None:
        """Publish a finished layer's file as its shard."""
        publish(source, self.folder / self._shard(index))

    def put_back(self, index: int) -> None:
        """Return a layer's shard to its dense weights."""
        self._save(self.folder / self._shard(index), self._names[index])

    def describe(self, card: str) -> None:
        """Replace the model card."""
        _write_text(self.folder / "README.md", card)

    def _write_dense(self, folder: Path) -> None:
        """All shards with dense weights, and their index."""
        of_layers = {name for names in self._names for name in names}
        rest = [name for name in self.files.names if name not in of_layers]
        shards: dict[str, Sequence[str]] = {self._shard(-1): rest}
        shards |= {self._shard(index): names for index, names in enumerate(self._names)}
        for shard, names in shards.items():
            self._save(folder / shard, names)
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        index = {"metadata": {"total_size": self.files.nbytes}, "weight_map": weight_map}
        _write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _save(self, path: Path, names: Sequence[str]) -> None:
        with replaced(path) as file:
            write_tensors(file, self.files.tensors(names), {"format": "pt"})

    def _shard(self, index: int) -> str:
        """File name of a layer's shard; -1: of all that is not in a layer."""
        return f"model-{index + 2:05}-of-{len(self._names) + 1:05}.safetensors"


def _write_text(path: Path, text: str) -> None:
    with replaced(path) as file:
        file.write(text.encode())
