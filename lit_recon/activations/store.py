"""Where the hidden states of all samples are kept: in memory, or in memory-mapped files (disk.py).

    memory   float32 in CPU memory
    disk     bfloat16 in one file per array, written and read batch after batch; the system keeps of them in memory what
             it has room for. Two arrays per chain serve in turn as input and output, so a file is never copied.
    auto     memory if the arrays fit into half of what is free, else disk

Shapes: S samples, T tokens, D hidden size.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch import Tensor

from lit_recon.activations.disk_store import SUFFIX, DiskStore, Needed, Rows, free_space
from lit_recon.activations.propagation import Propagation
from lit_recon.model.windows import WindowKind
from lit_recon.system.units import in_gb

log = logging.getLogger(__name__)

KEPT_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHARE = 0.5  # of the free memory: what "auto" may take


class Store(Protocol):
    """Makes arrays. An array is an ordinary tensor; what it takes is given back when nothing refers to it any more."""

    dtype: torch.dtype

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """A new array on the CPU, in `dtype`."""

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
    """Arrays in CPU memory.

    Args:
        dtype: Their type.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """A new array."""
        return torch.zeros(*shape, dtype=self.dtype)

    def prefetch(self, array_STD: Tensor, rows: Rows) -> None:
        """Nothing to do."""

    def release(self, array_STD: Tensor, rows: Rows) -> None:
        """Nothing to do."""

    def needed(self, shape: Sequence[int], count: int) -> Needed:
        """Bytes that `count` arrays of a shape take."""
        return Needed(memory=count * math.prod(shape) * self.dtype.itemsize, disk=0)

    def close(self) -> None:
        """Nothing to do."""

    def __enter__(self) -> "MemoryStore":
        """The store, closed at the end of the context."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def on_device(rows: Tensor, device: torch.device) -> Tensor:
    """Rows of an array in float32 on a device.

    They go through pinned memory, from which a GPU copies while it computes. Whole arrays are not pinned: pinned memory
    comes in powers of two.
    """
    staged = rows.pin_memory() if device.type == "cuda" else rows
    return staged.to(device, non_blocking=True).float()  # moved before they grow


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
class StoreSettings:
    """Where a run keeps its hidden states.

    Attributes:
        kind: "memory", "disk" or "auto".
        targets: "keep", or "recompute": targets are made per batch from their inputs by a copy of the dense window.
        dtype: "bfloat16" or "float32"; None: float32 in memory, bfloat16 on disk.
    """

    kind: str = "memory"
    targets: str = "keep"
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Check the settings; all problems in one message."""
        allowed = {
            "kind": ("memory", "disk", "auto"),
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

    def needed(self, shape: Sequence[int], count: int, limit: int | None = None) -> Needed:
        """What `count` arrays of this shape (S, T, D) take; "auto" is decided by what is free now, up to `limit`."""
        size = count * math.prod(shape)
        in_memory = size * self._dtype("memory").itemsize
        if self.kind == "memory" or (
            self.kind == "auto" and in_memory <= SHARE * min(_available(), limit or _available())
        ):
            return Needed(in_memory, 0)
        return Needed(0, size * self._dtype("disk").itemsize)

    def check(self, folder: Path, shape: Sequence[int], count: int, limit: int | None = None) -> None:
        """Check that the disk has room for `count` arrays of this shape (S, T, D) in `folder`, which need not exist.

        Raises:
            ValueError: It has not.
        """
        leftovers = sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}"))  # of a killed run; they will go
        needed, free = self.needed(shape, count, limit).disk, free_space(folder) + leftovers
        if needed > free:
            raise ValueError(
                f"store={self.kind}: the activations ({count} arrays of {' x '.join(map(str, shape))}) need "
                f"{in_gb(needed)} in {folder}, where {in_gb(free)} are free. Free some space, choose an output_dir on "
                "another disk, use fewer or shorter samples (data.num_samples, data.length), "
                f"{'' if self.recompute else 'store.targets=recompute, '}or store=memory if there is enough of that."
            )

    def open(self, folder: Path, shape: Sequence[int], count: int, limit: int | None = None) -> MemoryStore | DiskStore:
        """A store for `count` arrays of this shape (S, T, D).

        Args:
            folder: Where files go, if there are any.
            shape: Of an array.
            count: How many there will be at most.
            limit: Of the memory that the run may take.
        """
        needed = self.needed(shape, count, limit)
        kind = "disk" if needed.disk else "memory"
        dtype = self._dtype(kind)
        where = f"{folder} as {str(dtype).removeprefix('torch.')}" if needed.disk else "memory"
        log.info("activations: %s in %s (store=%s)", in_gb(max(needed)), where, self.kind)
        return DiskStore(folder, dtype) if needed.disk else MemoryStore(dtype)

    def _dtype(self, kind: str) -> torch.dtype:
        return KEPT_DTYPES[self.dtype or {"memory": "float32", "disk": "bfloat16"}[kind]]


def _available() -> int:
    return psutil.virtual_memory().available
