"""A window's weights in, and out again: float32 masters while a window is in work, the model's own weights otherwise.

A model that is streamed has its weights in files: the dense ones in its checkpoint, those of finished layers in the
files of the commits, all mapped. One set of masters is resident and serves every window of the same shapes. A model
that cannot be streamed is in memory as a whole.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_recon.fit.progress import no_progress_bars
from lit_recon.model.decoder import decoder_layers
from lit_recon.model.mapped_files import DenseFiles, layer_state, point_at
from lit_recon.model.windows import Window
from lit_recon.pruning.masks import PackedMasks
from lit_recon.system.atomic_files import replaced_folder

_ALIGNED = 16  # weights: each master starts at a multiple of 64 bytes
Write = Callable[..., Path]  # of a name, tensors and metadata; the file that holds them then


class Checkpoint:
    """The model between its windows: brings one in, takes it back, saves the whole.

    Args:
        model: The model on the CPU in its own dtype.
        device: Where windows are worked on.
        files: Where it is streamed, the files that its weights are mapped from.

    Attributes:
        masks: The masks of the windows that are done.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, *, files: DenseFiles | None = None) -> None:
        self.model = model
        self.device = device
        self.files = files
        self.masks = PackedMasks()
        self.prefix, self.layers = decoder_layers(model)
        self._in_work: Window | None = None
        self._homes: list[Tensor] = []  # its weights, as they were
        self._masters = _Masters(device)
        self._written: dict[int, DenseFiles] = {}  # the files of the layers that are done
        if files is not None:  # what is beside the layers too, so that the map that it was loaded from goes
            others = {name: one for name, one in model.named_parameters() if not name.startswith(f"{self.prefix}.")}
            point_at(model, "", files.tensors(files.same(others)))
        self.unmap()

    def unmap(self) -> None:
        """Have what was read of the mapped layers leave the memory: each is mapped anew, by itself."""
        if self.files is not None:
            for index, layer in enumerate(self.layers):
                prefix = f"{self.prefix}.{index}"
                files = self._written.get(index, self.files)
                point_at(layer, prefix, files.tensors(layer_state(layer, prefix)))

    def bring_in(self, window: Window) -> None:
        """Put a window's weights on the device, in float32."""
        self._in_work, self._homes = window, [parameter.data for parameter in window.parameters()]
        for parameter, master in zip(window.parameters(), self._masters.of(self._homes), strict=True):
            parameter.data = master
        window.to(self.device)  # buffers

    def read_ahead(self, indices: Iterable[int]) -> None:
        """Have the weights of layers that come next read in the background."""
        if self.files:
            for index in indices:
                self.files.read_ahead(layer_state(self.layers[index], f"{self.prefix}.{index}"))

    @torch.no_grad()
    def round(self, window: Window) -> None:
        """Have the window compute with what will be stored of its weights; it stays float32."""
        for parameter, home in zip(window.parameters(), self._homes, strict=True):
            parameter.copy_(parameter.to(home.dtype))

    @torch.no_grad()
    def take_back(self, window: Window, masks: Mapping[str, Tensor]) -> None:
        """Take a finished window back in the model's own dtypes, with its masks; layers not kept, as they were."""
        dropped = {id(parameter) for parameter in window.passed_on()}
        for parameter, home in zip(window.parameters(), self._homes, strict=True):
            master = parameter.data
            if id(parameter) not in dropped:
                home = home.copy_(master) if self.files is None else master.to("cpu", home.dtype, copy=True)
            parameter.data = home
        window.to("cpu")
        self._in_work, self._homes = None, []
        for matrix in window.matrices():
            if matrix.name in masks and id(matrix.weight) not in dropped:
                self.masks.add(matrix.name, masks[matrix.name])

    def put_back(self) -> None:
        """Have the window that is in work, if there is one, as it was."""
        if self._in_work is not None:
            for parameter, home in zip(self._in_work.parameters(), self._homes, strict=True):
                parameter.data = home
            self._in_work.to("cpu")
            self._in_work, self._homes = None, []

    def write(self, window: Window, write: Write, number: int) -> tuple[dict[int, str], str]:
        """Write a finished window, its layers and its masks, to files; where it is streamed, have it mapped from them.

        Args:
            window: The window.
            write: Writes one file.
            number: Windows done so far, which makes the files' names unique.

        Returns:
            The names of the layers' files by index, and that of its masks.
        """
        names = {index: f"layer_{index:05}.{number:05}" for index in window.indices[: window.kept]}
        for index, name in names.items():
            state = layer_state(self.layers[index], f"{self.prefix}.{index}")
            self._restore_layer(index, write(name, state, {"format": "pt"}), copy=False)
        mine, done = self.masks.of(matrix.name for matrix in window.matrices()), f"masks.{number:05}"
        self.masks.update(PackedMasks.load(write(done, mine.tensors(), mine.metadata())))
        return names, done

    def restore(self, layers: Mapping[int, Path], masks: Iterable[Path]) -> None:
        """Take over what an earlier run wrote."""
        for index, path in layers.items():
            self._restore_layer(index, path, copy=True)
        for path in masks:
            self.masks.update(PackedMasks.load(path))

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
        """Write a model that is in memory, its tokenizer and a model card as a Hugging Face folder, all at once."""
        with replaced_folder(folder) as partial:
            try:
                with no_progress_bars():
                    self.model.save_pretrained(partial)
            except SafetensorError as error:  # it tells of a full disk in words
                number = re.search(r"os error (\d+)", str(error))
                raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else error from error
            tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(card, encoding="utf-8")

    @torch.no_grad()
    def _restore_layer(self, index: int, path: Path, *, copy: bool) -> None:
        """Map a layer from its file where the model is streamed; otherwise copy it into memory, if asked to."""
        layer, prefix = self.layers[index], f"{self.prefix}.{index}"
        state = layer_state(layer, prefix)
        if self.files is not None:
            self._written[index] = DenseFiles([path])
            point_at(layer, prefix, self._written[index].tensors(state))
        elif copy:
            for name, stored in DenseFiles([path]).tensors(state).items():
                state[name].copy_(stored)


class _Masters:
    """Float32 weights of the window in work, in one piece of the device's memory that serves all windows in turn."""

    def __init__(self, device: torch.device) -> None:
        self._memory_N = torch.empty(0, device=device)

    @torch.no_grad()
    def of(self, homes: Sequence[Tensor]) -> list[Tensor]:
        """Masters of some weights; those of an earlier call are no longer theirs."""
        sizes = [-(-home.numel() // _ALIGNED) * _ALIGNED for home in homes]
        if sum(sizes) > len(self._memory_N):
            device = self._memory_N.device
            self._memory_N = torch.empty(0, device=device)  # first, so that both are never there at once
            self._memory_N = torch.empty(sum(sizes), device=device)
        pieces = self._memory_N[: sum(sizes)].split(sizes)
        return [piece[: home.numel()].view(home.shape).copy_(home) for piece, home in zip(pieces, homes, strict=True)]
