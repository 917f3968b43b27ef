"""Weights of one window, moved to the device in float32 and back; the model's own weights otherwise.

A model that is streamed has its weights in files: the dense ones in its checkpoint, those of finished layers in files
that are written after each window, all mapped. One set of float32 masters is resident and serves every window of the
same shapes. A model that cannot be streamed is in memory as a whole.

To a GPU weights go in the model's own dtype, and grow there; those of the next window are read into pinned memory while
one is trained (staged_weights.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.model.decoder import decoder_layers
from lit_recon.model.mapped_files import DenseFiles, layer_state, point_at
from lit_recon.model.staged_weights import StagedWeights
from lit_recon.model.windows import AnyWindow, MatrixWindow, Window
from lit_recon.system.clock import Clock, timed

_ALIGNED = 16  # weights: each master starts at a multiple of 64 bytes


class WeightOffloader:
    """Moves the weights of one window at a time to the device, and back.

    Args:
        model: The model on the CPU in its own dtype.
        device: Where windows are trained.
        files: Where it is streamed, the files that its weights are mapped from.
        clock: Takes the seconds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        *,
        files: DenseFiles | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.model, self.device, self.files = model, device, files
        self.clock = clock or Clock()
        self.prefix, self.layers = decoder_layers(model)
        self._window: Window | None = None  # the one on the device
        self._homes: list[Tensor] = []  # its weights, as they were
        self._masters = _Masters(device)
        self.staged = StagedWeights() if device.type == "cuda" else None  # of the next window
        self._written: dict[int, DenseFiles] = {}  # the files of the layers that are done
        if files is not None:  # what stands outside of the layers too, so that the map that it was loaded from goes
            others = {name: one for name, one in model.named_parameters() if not name.startswith(f"{self.prefix}.")}
            point_at(model, "", files.tensors(files.same(others)))
        self.release_pages()

    def release_pages(self) -> None:
        """Drop what was read of mapped layers from memory: each layer is mapped anew, by itself."""
        if self.files is not None:
            for index, layer in enumerate(self.layers):
                prefix = f"{self.prefix}.{index}"
                files = self._written.get(index, self.files)
                point_at(layer, prefix, files.tensors(layer_state(layer, prefix)))

    @timed("advance")
    def onload(self, window: Window, prefetch: Iterable[int] = ()) -> None:
        """Put a window's weights on the device, in float32.

        Args:
            window: The window.
            prefetch: Indices of the layers that come next, whose weights are read in the background.
        """
        self._window, self._homes = window, [parameter.data for parameter in window.parameters()]
        ready = [home if self.staged is None else self.staged.of(home) for home in self._homes]
        for parameter, master in zip(window.parameters(), self._masters.filled_with(ready), strict=True):
            parameter.data = master
        window.to(self.device)  # buffers
        if self.staged is not None:
            here = {id(parameter) for parameter in window.parameters()}  # their values are about to change
            upcoming = (one for index in prefetch for one in self.layers[index].parameters())
            self.staged.read([one.data for one in upcoming if id(one) not in here])
        elif self.files is not None:
            for index in prefetch:
                self.files.read_ahead(layer_state(self.layers[index], f"{self.prefix}.{index}"))

    def dtypes(self, window: AnyWindow) -> list[torch.dtype]:
        """Dtypes in which a window's own parameters are stored; of the one on the device, or of a matrix of it."""
        assert self._window is not None
        homes = {id(one): home.dtype for one, home in zip(self._window.parameters(), self._homes, strict=True)}
        matrix = window.matrix.weight if isinstance(window, MatrixWindow) else None
        return [homes[id(matrix if matrix is not None else one)] for one in window.own_parameters()]

    def as_stored(self, window: Window, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors for some matrices of the window on the device, by name, in the dtypes in which these are stored."""
        homes = {id(one): home.dtype for one, home in zip(window.parameters(), self._homes, strict=True)}
        matrices = (matrix for matrix in window.matrices() if matrix.name in tensors)
        return {matrix.name: tensors[matrix.name].to(homes[id(matrix.weight)]) for matrix in matrices}

    @timed("commit")
    @torch.no_grad()
    def offload(self, window: Window) -> None:
        """Move a finished window back in the model's own dtypes; layers that are not kept return as they were."""
        dropped = {id(parameter) for parameter in window.shared_with_next()}
        for parameter, home in zip(window.parameters(), self._homes, strict=True):
            master = parameter.data
            if id(parameter) not in dropped:
                stored = master.to(home.dtype)  # narrowed before it is moved
                home = home.copy_(stored) if self.files is None else stored.to("cpu", copy=stored is master)
            parameter.data = home
        window.to("cpu")
        self._window, self._homes = None, []

    def discard(self) -> None:
        """Return the window that is on the device, if there is one, to what it was."""
        if self._window is not None:
            for parameter, home in zip(self._window.parameters(), self._homes, strict=True):
                parameter.data = home
            self._window.to("cpu")
            self._window, self._homes = None, []

    def dense_layer(self, index: int) -> dict[str, Tensor]:
        """The dense tensors of a layer by their names in it: mapped from the files, or copies of those it has now."""
        prefix = f"{self.prefix}.{index}"
        state = layer_state(self.layers[index], prefix)
        if self.files is not None:
            found = self.files.tensors(state)
        else:
            found = {name: tensor.detach().clone() for name, tensor in state.items()}
        return {name.removeprefix(f"{prefix}."): tensor for name, tensor in found.items()}

    def layer_tensors(self, index: int) -> dict[str, Tensor]:
        """The tensors of a layer by their names in the model."""
        return layer_state(self.layers[index], f"{self.prefix}.{index}")

    def map_layer(self, index: int, path: Path) -> None:
        """Map a finished layer from the file that it was written to, where the model is streamed."""
        if self.files is not None:
            self._written[index] = DenseFiles([path])
            tensors = self._written[index].tensors(self.layer_tensors(index))
            point_at(self.layers[index], f"{self.prefix}.{index}", tensors)

    @torch.no_grad()
    def restore_layer(self, index: int, path: Path) -> None:
        """Restore a layer that an earlier run wrote: mapped where the model is streamed, else copied."""
        self.map_layer(index, path)
        if self.files is None:
            state = self.layer_tensors(index)
            for name, stored in DenseFiles([path]).tensors(state).items():
                state[name].copy_(stored)


class _Masters:
    """Float32 weights of the window on the device, in one piece of memory that serves all windows in turn."""

    def __init__(self, device: torch.device) -> None:
        self._memory_N = torch.empty(0, device=device)

    @torch.no_grad()
    def filled_with(self, homes: Sequence[Tensor]) -> list[Tensor]:
        """Masters of some weights, in place of those of the window before."""
        sizes = [-(-home.numel() // _ALIGNED) * _ALIGNED for home in homes]
        if sum(sizes) > len(self._memory_N):
            device = self._memory_N.device
            self._memory_N = torch.empty(0, device=device)  # first, so that both are never there at once
            self._memory_N = torch.empty(sum(sizes), device=device)
        pieces = self._memory_N[: sum(sizes)].split(sizes)
        masters = [piece[: home.numel()].view(home.shape) for piece, home in zip(pieces, homes, strict=True)]
        for master, home in zip(masters, homes, strict=True):
            master.copy_(home.to(master.device, non_blocking=True))
        return masters
