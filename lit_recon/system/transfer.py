"""Copies between CPU memory and a GPU: 16 bits stay 16 bits on the way, and copies run while the GPU computes.

PyTorch's copy between a CPU tensor and one of another dtype on a GPU converts on the CPU, and moves the wider of the
two. A copy runs in the background only from and to pinned memory. PyTorch's own pinned memory comes in powers of two,
so large arrays are ordinary memory that is registered with CUDA; small ones are staged.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from weakref import finalize

import torch
from torch import Tensor


class _Buffer(bytearray):
    """Memory that can be referred to weakly: what refers to it is told before it is freed."""


def pinned_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in CPU memory that a GPU copies from and to in the background; ordinary zeros where CUDA refuses that."""
    size = prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(*shape, dtype=dtype)
    buffer = _Buffer(size)
    array = torch.frombuffer(buffer, dtype=dtype).view(*shape)  # keeps the buffer alive, as do views of it
    if register(array.data_ptr(), size):
        finalize(buffer, unregister, array.data_ptr()).atexit = False  # CUDA may be gone by then
    return array


def register(address: int, size: int) -> bool:
    """Pin memory that is there; whether CUDA could."""
    try:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size, 0))
    except RuntimeError:
        with suppress(RuntimeError):  # the next launch reports the error once more, and clears it
            torch.zeros(1, device="cuda")
        return False
    return True


def unregister(address: int) -> None:
    """Unpin memory before it is freed; none of the copies from or to it may be under way."""
    torch.cuda.synchronize()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, in its own dtype; to a GPU it goes through pinned memory, and is on its way afterwards."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def put(target: Tensor, values: Tensor) -> None:
    """Copy values into a tensor of maybe another dtype and device, converted where the values are.

    To CPU memory that is pinned the copy may be under way afterwards.
    """
    target.copy_(values.to(target.dtype), non_blocking=True)


def rows_to(array: Tensor, rows: Sequence[int], device: torch.device) -> Tensor:
    """Some rows of an array on a device, in its dtype, each copied straight from where it lies."""
    if array.device.type == device.type:
        return torch.stack([array[row] for row in rows])
    copied = torch.empty((len(rows), *array.shape[1:]), dtype=array.dtype, device=device)
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        copied.copy_(array[rows[0] : rows[0] + len(rows)], non_blocking=True)
    else:
        for place, row in zip(copied, rows, strict=True):
            place.copy_(array[row], non_blocking=True)
    return copied


class LateNumber:
    """A number that a GPU may not have computed yet, on its way to the CPU.

    Args:
        number: One number.

    Attributes:
        is_there: Whether nothing has to be waited for.
    """

    def __init__(self, number: Tensor) -> None:
        self.is_there = number.device.type != "cuda"
        self._number = number
        if not self.is_there:
            self._number = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def value(self) -> float:
        """The number, once it is computed; what was asked for after it may still be under way."""
        if not self.is_there:
            self._done.synchronize()
        return float(self._number)


class CopyStream:
    """Runs copies beside what a GPU computes.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, copy: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Start a copy; what is returned gives its result to whatever is computed after that."""
        with torch.cuda.stream(self._stream):
            copied = copy()
        done = self._stream.record_event()

        def take() -> Tensor:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(done)
            copied.record_stream(now)
            return copied

        return take

    def wait(self) -> None:
        """Wait for all copies, and for what is computed."""
        torch.cuda.synchronize(self.device)
