"""What is measured beside perplexity: relative errors, seconds per phase, peak memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lit_recon.activations import Chain
from lit_recon.windows import Window

PHASES = ("load", "teacher", "prune", "fit", "advance", "commit", "evaluate")


class Clock:
    """Seconds per phase of a run; phases do not nest."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent in the context to phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.started


def relative_error(window: Window, chain: Chain, first: int, last: int, *, variance: float) -> float:
    """Mean squared error of the window's outputs over the variance of the targets, for samples `first` to `last`."""
    total = torch.zeros((), dtype=torch.float64, device=chain.compute.device)
    for rows in chain.batches(first, last):
        targets_BTD = chain.targets_STD[rows].to(chain.compute.device, non_blocking=True)
        total += (chain.outputs(window, rows) - targets_BTD).square().sum(dtype=torch.float64)
    return total.item() / (last - first) / chain.targets_STD[0].numel() / variance


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process had so far: resident on the CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes
