"""Where the hidden states of all samples are kept: on the device, in CPU memory, or in memory-mapped files (disk.py).

    device   bfloat16 on the GPU on which windows are trained
    memory   float32 in CPU memory; bfloat16 and pinned where a GPU reads it, the next batch while one is computed
    disk     bfloat16 in one file per array, written and read batch after batch; the system keeps of them in memory what
             it has room for. Two arrays per chain serve in turn as input and output, so a file is never copied.
    auto     on a GPU: device if the arrays fit into half of what training leaves free; then
             memory if the arrays fit into half of what is free, else disk

Shapes: S samples, T tokens, D hidden size.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch import Tensor

from lit_recon.activations.disk_store import SUFFIX, DiskStore, Needed, Rows, free_space
from lit_recon.activations.propagation import Propagation
from lit_recon.model.windows import WindowKind
from lit_recon.system.transfer import CopyStream, moved, pinned_zeros, rows_to
from lit_recon.system.units import in_gb

log = logging.getLogger(__name__)

KEPT_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHARE = 0.5  # of the free memory: what "auto" may take
CPU = torch.device("cpu")
_AHEAD = 4  # batches of an array that may be on their way at once: this one's and the next one's inputs and targets


class Store(Protocol):
    """Makes arrays. An array is an ordinary tensor; what it takes is given back when nothing refers to it any more.

    Attributes:
        dtype: Of the arrays.
        device: Where they are.
    """

    dtype: torch.dtype
    device: torch.device

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """A new array."""

    def load(self, array_STD: Tensor, rows: Rows, device: torch.device) -> Tensor:
        """Some samples on a device, in float32; maybe the array's own memory, so not to be changed."""

    def settle(self) -> None:
        """Wait for what is on its way from and to arrays, before and after these are changed."""

    def prefetch(self, array_STD: Tensor, rows: Rows) -> None:
        """Tell that some samples will be read next."""

    def release(self, array_STD: Tensor, rows: Rows) -> None:
        """Tell that some samples, whose values stay, will not be read or written soon."""

    def needed(self, shape: Sequence[int], count: int) -> Needed:
        """Bytes that `count` arrays of a shape take."""

    def close(self) -> None:
        """Leave nothing behind."""

    def __enter__(self) -> "Store":
        """The store, closed at the end of the context."""

    def __exit__(self, *_: object) -> None:
        """Close it."""


class MemoryStore:
    """Arrays in the memory of the CPU, or of the GPU on which windows are trained.

    Args:
        dtype: Their type.
        device: Where they are.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> None:
        self.dtype, self.device = dtype, device

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """A new array."""
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def load(self, array_STD: Tensor, rows: Rows, device: torch.device) -> Tensor:
        """Some samples on a device, in float32."""
        if self.device.type == "cpu" or isinstance(rows, slice):
            return moved(array_STD[rows], device).float()  # moved before they grow
        return rows_to(array_STD, rows, device).float()  # an index would be a copy that the CPU waits for

    def settle(self) -> None:
        """Nothing to do."""

    def prefetch(self, array_STD: Tensor, rows: Rows) -> None:
        """Nothing to do."""

    def release(self, array_STD: Tensor, rows: Rows) -> None:
        """Nothing to do."""

    def needed(self, shape: Sequence[int], count: int) -> Needed:
        """Bytes that `count` arrays of a shape take."""
        size = count * math.prod(shape) * self.dtype.itemsize
        return Needed(0, 0, size) if self.device.type != "cpu" else Needed(size, 0)

    def close(self) -> None:
        """Nothing to do."""

    def __enter__(self) -> "MemoryStore":
        """The store, closed at the end of the context."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class PinnedStore(MemoryStore):
    """Arrays in CPU memory that is pinned, of which a GPU is given the next batch while it computes with one.

    Args:
        dtype: Their type.
        copies: Runs the copies.
        zeros: Makes an array.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        copies: CopyStream,
        zeros: Callable[[Sequence[int], torch.dtype], Tensor] = pinned_zeros,
    ) -> None:
        super().__init__(dtype)
        self._copies, self._zeros = copies, zeros
        # With the array, so that no other takes its address; what was never asked for is the first to go.
        self._ahead: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Callable[[], Tensor]]] = {}

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """A new array."""
        return self._zeros(shape, self.dtype)

    def prefetch(self, array_STD: Tensor, rows: Rows) -> None:
        """Have some samples copied to the GPU."""
        key = _key(array_STD, rows)
        if key[1] and key not in self._ahead:
            take = self._copies.start(lambda: rows_to(array_STD, key[1], self._copies.device))
            self._ahead[key] = array_STD, take
            if len(self._ahead) > _AHEAD:
                del self._ahead[next(iter(self._ahead))]

    def load(self, array_STD: Tensor, rows: Rows, device: torch.device) -> Tensor:
        """Some samples on the GPU, in float32: those that were prefetched, or copied now."""
        key = _key(array_STD, rows)
        if key in self._ahead:
            return self._ahead.pop(key)[1]().float()
        return rows_to(array_STD, key[1], device).float()

    def settle(self) -> None:
        """Wait for what is on its way, and forget what was prefetched."""
        self._ahead.clear()
        self._copies.wait()


def kind_of(store: Store) -> str:
    """Where a store keeps its arrays: "device", "memory" or "disk"."""
    if isinstance(store, DiskStore):
        return "disk"
    return "memory" if store.device.type == "cpu" else "device"


def _key(array_STD: Tensor, rows: Rows) -> tuple[int, tuple[int, ...]]:
    """What tells some samples of an array from others."""
    chosen = range(*rows.indices(len(array_STD))) if isinstance(rows, slice) else rows
    return array_STD.data_ptr(), tuple(chosen)


def count_arrays(
    propagation: Propagation,
    targets: str,
    *,
    kind: str = WindowKind.BLOCK,
    parallel: bool = False,
    overlapping: bool = False,
    prune_by: str = "window",
) -> int:
    """How many arrays of all samples' hidden states are there at most.

    Args:
        propagation: Which chains are kept.
        targets: "keep" or "recompute".
        kind: What kind of windows there are.
        parallel: Whether halves stand side by side. They need one array more for each chain, and one for targets of
            their own where windows correct the sparse chain.
        overlapping: Whether windows overlap: targets are then not the dense chain's next value.
        prune_by: What is pruned at once. Of pruning windows smaller than a window, the sparse chain steps over each.
    """
    chains = propagation.needs_dense + propagation.needs_sparse
    aside = chains if parallel else 0
    is_smaller = prune_by != "window" and WindowKind(prune_by) in WindowKind(kind).smaller
    if propagation.statistics == "sparse" and is_smaller:
        aside += 2 if prune_by == WindowKind.HALF else 1
    if targets == "recompute":
        return chains + (propagation.inputs == "mix") + aside
    own = propagation.corrects if parallel else overlapping and propagation.targets == "dense"
    return propagation.num_arrays + aside + own


def check_targets(kind: str, targets: str) -> None:
    """Raise a ValueError for windows whose targets cannot be recomputed."""
    if targets == "recompute" and kind == WindowKind.MATRIX:
        raise ValueError(
            "store.targets=recompute with windows=matrix: a single matrix's targets are made once from what its layer "
            "shows; use store.targets=keep, or larger windows."
        )


@dataclass(frozen=True, kw_only=True)
class Room:
    """Room for arrays, in the memory of the CPU and of the GPU on which windows are trained.

    Attributes:
        device: Where windows are trained.
        limit: Of the memory that the run may take where they are; None: what is free.
        reserved: Bytes that training takes there besides.
    """

    device: torch.device = CPU
    limit: int | None = None
    reserved: int = 0

    def on_device(self) -> int:
        """Bytes of a GPU that are free besides training."""
        if self.device.type != "cuda":
            return 0
        free = torch.cuda.mem_get_info(self.device)[0]
        return max(0, min(free, self.limit or free) - self.reserved)

    def in_memory(self) -> int:
        """Bytes of the CPU's memory that are free; of a GPU's run the limit is that of the GPU."""
        available = psutil.virtual_memory().available
        return available if self.device.type == "cuda" else min(available, self.limit or available)


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """Where a run keeps its hidden states.

    Attributes:
        kind: "device", "memory", "disk" or "auto".
        targets: "keep", or "recompute": targets are made per batch from their inputs by a copy of the dense window.
        dtype: "bfloat16" or "float32"; None: float32 in memory without a GPU, else bfloat16.
    """

    kind: str = "memory"
    targets: str = "keep"
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Check the settings; all problems in one message."""
        allowed = {
            "kind": ("device", "memory", "disk", "auto"),
            "targets": ("keep", "recompute"),
            "dtype": (None, *KEPT_DTYPES),
        }
        problems = [
            f"store.{name}={getattr(self, name)!r}: expected one of {', '.join(str(choice) for choice in choices)}."
            for name, choices in allowed.items()
            if getattr(self, name) not in choices
        ]
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def recompute(self) -> bool:
        """Whether targets are recomputed."""
        return self.targets == "recompute"

    def check_device(self, device: torch.device) -> None:
        """Raise a ValueError for arrays on a device that has no memory of its own."""
        if self.kind == "device" and device.type != "cuda":
            raise ValueError(
                f"store=device: this run computes on the {device.type.upper()}, whose memory is store=memory; use that "
                "or store=auto, which takes a GPU's memory where there is one."
            )

    def needed(self, shape: Sequence[int], count: int, room: Room) -> Needed:
        """What `count` arrays of this shape (S, T, D) take; "auto" is decided by what is free now."""
        size = count * math.prod(shape)
        on_device = size * self._dtype("device", room.device).itemsize
        in_memory = size * self._dtype("memory", room.device).itemsize
        auto = self.kind == "auto"
        if self.kind == "device" or (auto and on_device <= SHARE * room.on_device()):
            return Needed(0, 0, on_device)
        if self.kind == "memory" or (auto and in_memory <= SHARE * room.in_memory()):
            return Needed(in_memory, 0)
        return Needed(0, size * self._dtype("disk", room.device).itemsize)

    def check(self, folder: Path, shape: Sequence[int], count: int, room: Room) -> None:
        """Check that the disk has room for `count` arrays of this shape (S, T, D) in `folder`, which need not exist.

        Raises:
            ValueError: It has not, or there is no GPU for arrays that shall be on it.
        """
        self.check_device(room.device)
        leftovers = sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}"))  # of a killed run; they will go
        needed, free = self.needed(shape, count, room).disk, free_space(folder) + leftovers
        if needed > free:
            raise ValueError(
                f"store={self.kind}: the activations ({count} arrays of {' x '.join(map(str, shape))}) need "
                f"{in_gb(needed)} in {folder}, where {in_gb(free)} are free. Free some space, choose an output_dir on "
                "another disk, use fewer or shorter samples (data.num_samples, data.length), "
                f"{'' if self.recompute else 'store.targets=recompute, '}or store=memory if there is enough of that."
            )

    def open(self, folder: Path, shape: Sequence[int], count: int, room: Room) -> MemoryStore | DiskStore:
        """A store for `count` arrays of this shape (S, T, D).

        Args:
            folder: Where files go, if there are any.
            shape: Of an array.
            count: How many there will be at most.
            room: Where they may be.
        """
        needed = self.needed(shape, count, room)
        kind = "device" if needed.device else "disk" if needed.disk else "memory"
        dtype = self._dtype(kind, room.device)
        named = str(dtype).removeprefix("torch.")
        where = {"device": f"GPU memory as {named}", "disk": f"{folder} as {named}", "memory": "memory"}[kind]
        log.info("activations: %s in %s (store=%s)", in_gb(max(needed)), where, self.kind)
        if kind == "disk":
            return DiskStore(folder, dtype)
        if kind == "memory" and room.device.type == "cuda":
            return PinnedStore(dtype, CopyStream(room.device))
        return MemoryStore(dtype, room.device if kind == "device" else CPU)

    def _dtype(self, kind: str, device: torch.device) -> torch.dtype:
        wide = kind == "memory" and device.type != "cuda"
        return KEPT_DTYPES[self.dtype or ("float32" if wide else "bfloat16")]
