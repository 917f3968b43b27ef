"""Boolean masks by matrix name, one bit per weight, in memory or mapped from the files that hold them.

Also the weights that a criterion has left, where it changes them: dense weights under a mask are not the pruned model.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_recon.system.atomic_files import replaced
from lit_recon.system.tensor_files import write_tensors


class Masks:
    """Boolean masks by matrix name, one bit per weight."""

    def __init__(self) -> None:
        self._packed: dict[str, tuple[Tensor, tuple[int, ...]]] = {}

    @classmethod
    def pack(cls, masks: Mapping[str, Tensor]) -> "Masks":
        """Pack boolean masks, by the names of their matrices."""
        packed = cls()
        for name, mask in masks.items():
            packed.add(name, mask)
        return packed

    def unpack(self) -> dict[str, Tensor]:
        """All masks, boolean."""
        return {name: self[name] for name in self}

    def add(self, name: str, mask: Tensor) -> None:
        """Pack one more mask."""
        self._packed[name] = torch.from_numpy(np.packbits(mask.cpu().numpy())), tuple(mask.shape)

    def __getitem__(self, name: str) -> Tensor:
        """The mask of a matrix, boolean, in the weight's shape."""
        bits, shape = self._packed[name]
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=int(np.prod(shape))).view(bool).reshape(shape))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a matrix."""
        return self._packed[name][1]

    def __contains__(self, name: str) -> bool:
        """Whether there is a mask of a matrix."""
        return name in self._packed

    def __iter__(self) -> Iterator[str]:
        """Names of the matrices."""
        return iter(self._packed)

    def __len__(self) -> int:
        """Number of masks."""
        return len(self._packed)

    def update(self, others: "Masks") -> None:
        """Take other masks over, in place of those of the same matrices."""
        self._packed |= others._packed

    def tensors(self) -> dict[str, Tensor]:
        """One uint8 tensor per matrix (numpy.packbits)."""
        return {name: bits for name, (bits, _) in self._packed.items()}

    def metadata(self) -> dict[str, str]:
        """What a file of `tensors` says besides them: the shapes as JSON."""
        shapes = json.dumps({name: shape for name, (_, shape) in self._packed.items()})
        return {"shapes": shapes, "packing": "numpy.packbits, True = kept"}

    def save(self, path: Path) -> None:
        """Write `tensors` and `metadata` as a safetensors file, whole or not at all."""
        with replaced(path) as file:
            write_tensors(file, self.tensors(), self.metadata())

    @classmethod
    def load(cls, path: Path) -> "Masks":
        """Map what `save` wrote."""
        masks = cls()
        with safe_open(path, framework="pt") as file:
            shapes = json.loads(file.metadata()["shapes"])
            masks._packed = {name: (file.get_tensor(name), tuple(shape)) for name, shape in shapes.items()}
        return masks

    @contextmanager
    def applied(self, layer: nn.Module, prefix: str, changed: "StoredWeights | None" = None) -> Iterator[None]:
        """A context in which a layer is pruned; its own weights return afterwards.

        Args:
            layer: The layer.
            prefix: Its qualified name in the model.
            changed: The weights that the criterion has left, where they are not the layer's own.
        """
        named = ((f"{prefix}.{name}", weight) for name, weight in layer.named_parameters())
        homes = {name: (weight, weight.data) for name, weight in named if name in self}
        try:
            for name, (weight, home) in homes.items():
                left = changed[name].to(home) if changed is not None and name in changed else home
                weight.data = (left * self[name].to(home.device)).add_(0.0)
            yield
        finally:
            for weight, home in homes.values():
                weight.data = home

    def count_zeros(self, model: PreTrainedModel) -> dict[str, int]:
        """Exact zeros of a model that these masks have pruned, by matrix.

        Raises:
            RuntimeError: A pruned weight is not exactly zero.
        """
        zeros = {}
        for name in self:
            kept = model.get_parameter(name) != 0
            if (kept & ~self[name]).any():
                raise RuntimeError(f"{name}: pruned weights are not zero in the checkpoint that was read back.")
            zeros[name] = kept.numel() - int(torch.count_nonzero(kept))
        return zeros


class StoredWeights:
    """Weights by matrix name in some safetensors files, each read when it is asked for."""

    def __init__(self) -> None:
        self._files: dict[str, Path] = {}

    def add(self, path: Path) -> None:
        """Take over all weights of a file, in place of those of the same matrices."""
        with safe_open(path, framework="pt") as file:
            self._files |= dict.fromkeys(file.keys(), path)

    def __contains__(self, name: str) -> bool:
        """Whether there are weights of a matrix."""
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        """The weights of a matrix, as they are stored."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)
