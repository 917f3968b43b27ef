"""What is measured beside perplexity: seconds per phase, peak memory."""

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

WALK = ("teacher", "prune", "fit", "advance", "commit")  # the phases that windows take
PHASES = ("load", *WALK, "evaluate")


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
        """Seconds since the clock was made, and those of the runs that were taken up."""
        return time.perf_counter() - self.started

    def resume(self, seconds: Mapping[str, float], elapsed: float) -> None:
        """Add what earlier runs took: seconds per phase, and in total."""
        for name, value in seconds.items():
            self.seconds[name] += value
        self.started -= elapsed


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process had so far: resident on the CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # unlike getrusage, it can be reset
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, others in KiB


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak from now on; on other systems than Linux, the peak of a process on the CPU stays what it was."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def release_memory() -> None:
    """Give back what a window or a walk has used; Trainer, module and optimizer refer to each other and would wait.

    glibc keeps freed memory between small blocks that are still in use; after 30 layers of matrices that is a gigabyte.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others have none
        if trim is not None:
            trim(0)


def in_gb(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """Seconds as a person reads them: "7.3 s", "2 min 05 s", "3 h 10 min"."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
