"""Memory of this process: its peak, a limit of it, and giving unused memory back to the system.

The system counts one peak, which is reset to learn that of a part of a run (clock.py).
"""

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from accelerate.utils import convert_file_size_to_int


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes: resident on the CPU, allocated by PyTorch on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # unlike getrusage, it can be reset
        with suppress(OSError, ValueError, IndexError):  # no /proc, or one of another kind, as in some sandboxes
            status = Path("/proc/self/status").read_text()
            return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not at the top: Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, others in KiB


def own_memory_bytes() -> int:
    """Memory that this process has of its own now, in bytes: on Linux without the pages of mapped files."""
    if sys.platform == "linux":
        with suppress(OSError, ValueError, IndexError):  # no /proc, or one of another kind
            return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024
    return psutil.Process().memory_info().rss


def reset_peak_memory(device: torch.device) -> bool:
    """Count the peak from now on, where that is possible; elsewhere the peak stays that of the process.

    On the CPU only Linux can do that, with a /proc that can be written.

    Returns:
        Whether it is possible.
    """
    if device.type == "cuda":
        if torch.cuda.is_initialized():  # until then its peak is 0, and a reset an error
            torch.cuda.reset_peak_memory_stats(device)
        return True
    if sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            return "VmHWM:" in Path("/proc/self/status").read_text()  # else the peak is that of getrusage
    return False


class PeakMemory:
    """Peak memory of this process from one look at it to the next.

    Args:
        device: Whose memory is meant.

    Attributes:
        is_reset: Whether each look counts anew; else each gives the peak of the process so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = peak_memory_bytes(device)
        self.is_reset = reset_peak_memory(device)

    def take(self) -> int:
        """Peak since the last look, in bytes; at the first that of the process so far."""
        peak = max(self._before, peak_memory_bytes(self.device))
        self._before = 0
        if self.is_reset:
            reset_peak_memory(self.device)
        return peak


def peaks_of(device: torch.device) -> tuple[PeakMemory, PeakMemory | None]:
    """The peak of the memory of a device, and of the CPU's where that is another one."""
    return PeakMemory(device), PeakMemory(torch.device("cpu")) if device.type == "cuda" else None


def release_memory() -> None:
    """Give memory that a window or a walk has used back to the system.

    Trainer, module and optimizer refer to each other, so that they wait for the garbage collector. glibc keeps freed
    memory between small blocks that are still in use; after 30 layers of matrices that is a gigabyte.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others have none
        if trim is not None:
            trim(0)


def parse_limit(limit: str | int) -> int:
    """Bytes of a limit such as "6GiB", "500MB" or a number.

    Raises:
        ValueError: It is none of these.
    """
    try:
        size = int(convert_file_size_to_int(limit))
    except ValueError:
        size = 0
    if size <= 0:
        raise ValueError(f"memory_limit={limit}: expected a size such as 6GiB, 500MB, or a number of bytes.")
    return size
