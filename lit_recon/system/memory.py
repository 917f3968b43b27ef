"""Memory of this process: its peak, and giving back what is not needed any more."""

import ctypes
import gc
import sys
from pathlib import Path

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process had so far: resident on the CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # unlike getrusage, it can be reset
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    import resource  # not there on Windows

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
