"""A window's weights in, and out again: float32 masters while a window is in work, the model's own dtype otherwise.

The output is a Hugging Face folder with exact zeros, a model card, and bit-packed masks beside it. It is written to a
temporary folder and renamed when it is whole, so that an interrupted run leaves no half-written checkpoint.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_recon.blocks import decoder_layers, from_float32, to_float32
from lit_recon.matrices import matrices
from lit_recon.models import no_progress_bars
from lit_recon.windows import Window


class PackedMasks:
    """Boolean masks by matrix name, one bit per weight."""

    def __init__(self) -> None:
        self._packed: dict[str, tuple[np.ndarray, tuple[int, ...]]] = {}

    def add(self, name: str, mask: Tensor) -> None:
        """Keep a mask."""
        self._packed[name] = np.packbits(mask.cpu().numpy()), tuple(mask.shape)

    def __getitem__(self, name: str) -> Tensor:
        """The mask of a matrix, boolean, in the weight's shape."""
        bits, shape = self._packed[name]
        return torch.from_numpy(np.unpackbits(bits, count=int(np.prod(shape))).view(bool).reshape(shape))

    def __iter__(self):
        """Names of the matrices."""
        return iter(self._packed)

    def __len__(self) -> int:
        """Number of masks."""
        return len(self._packed)

    def save(self, path: Path) -> None:
        """Write one uint8 tensor per matrix (numpy.packbits); the metadata holds the shapes as JSON."""
        shapes = json.dumps({name: shape for name, (_, shape) in self._packed.items()})
        temporary = path.with_name(path.name + ".partial")
        tensors = {name: torch.from_numpy(bits) for name, (bits, _) in self._packed.items()}
        save_file(tensors, temporary, metadata={"shapes": shapes, "packing": "numpy.packbits, True = kept"})
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "PackedMasks":
        """Read what `save` wrote."""
        masks = cls()
        with safe_open(path, framework="np") as file:
            shapes = json.loads(file.metadata()["shapes"])
            masks._packed = {name: (file.get_tensor(name), tuple(shape)) for name, shape in shapes.items()}
        return masks

    @torch.no_grad()
    def apply(self, model: PreTrainedModel) -> None:
        """Zero the pruned weights of `model` in place."""
        prefix, layers = decoder_layers(model)
        for index, layer in enumerate(layers):
            for matrix in matrices(layer, f"{prefix}.{index}"):
                if matrix.name in self._packed:
                    matrix.weight.mul_(self[matrix.name].to(matrix.weight.device))

    def check(self, model: PreTrainedModel) -> None:
        """Raise a RuntimeError if a pruned weight of `model` is not exactly zero."""
        for name in self:
            if torch.count_nonzero(model.get_parameter(name)[~self[name]]):
                raise RuntimeError(f"{name}: pruned weights are not zero in the checkpoint that was read back.")


class Checkpoint:
    """The model between its windows: brings one in, writes it out, saves the whole.

    Args:
        model: The model, resident on the CPU in its own dtype.
        device: Where windows are worked on.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.masks = PackedMasks()
        self._dtypes: dict[str, list[torch.dtype]] = {}
        self._passed_on: list[Tensor] = []

    def bring_in(self, window: Window) -> None:
        """Put a window's weights on the device, in float32."""
        self._passed_on = [parameter.detach().clone() for parameter in window.passed_on()]
        self._dtypes[window.name] = to_float32(window, self.device)

    @torch.no_grad()
    def round(self, window: Window) -> None:
        """Have the window compute with what will be stored of its weights; it stays float32."""
        for parameter, dtype in zip(window.parameters(), self._dtypes[window.name], strict=True):
            parameter.copy_(parameter.to(dtype))

    @torch.no_grad()
    def write_out(self, window: Window, masks: Mapping[str, Tensor]) -> None:
        """Take a finished window back in the model's own dtypes, with its masks; layers not kept, as they were."""
        from_float32(window, self._dtypes.pop(window.name))
        for parameter, value in zip(window.passed_on(), self._passed_on, strict=True):
            parameter.copy_(value)
        dropped = {id(parameter) for parameter in window.passed_on()}
        kept = {matrix.name for matrix in window.matrices() if id(matrix.weight) not in dropped}
        for name in kept & set(masks):
            self.masks.add(name, masks[name])

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
        """Write the model, its tokenizer and a model card as a Hugging Face folder, all at once."""
        partial = folder.with_name(folder.name + ".partial")
        try:
            with no_progress_bars():
                self.model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(card, encoding="utf-8")
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # nothing half-written stays behind
