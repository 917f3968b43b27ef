"""Weights of the next window, read from their files into pinned memory in the background, from where a GPU takes them.

There is memory for one window, in the model's own dtype; it serves all windows in turn.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lit_recon.system.transfer import pinned_zeros

_ALIGNED = 64  # bytes


class StagedWeights:
    """Copies of weights in pinned memory, made ahead.

    Args:
        zeros: Makes the memory.
        wait: Waits until the GPU has taken what is in it.
    """

    def __init__(
        self,
        zeros: Callable[[Sequence[int], torch.dtype], Tensor] = pinned_zeros,
        wait: Callable[[], None] = torch.cuda.synchronize,
    ) -> None:
        self._zeros, self._wait = zeros, wait
        self._memory_N = torch.empty(0, dtype=torch.uint8)
        self._threads = ThreadPoolExecutor(1)
        self._reading: Future[None] | None = None
        # By address, with the weights themselves, so that no others take their place in memory.
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def read(self, weights: Sequence[Tensor]) -> None:
        """Start to read weights, in place of those that were read before."""
        self._finish()
        self._copies = {}
        self._wait()
        starts, end = [], 0
        for one in weights:
            starts.append(end)
            end += -(-one.nbytes // _ALIGNED) * _ALIGNED
        if end > len(self._memory_N):
            self._memory_N = torch.empty(0, dtype=torch.uint8)  # first, so that both are never there at once
            self._memory_N = self._zeros([end], torch.uint8)
        for one, start in zip(weights, starts, strict=True):
            copy = self._memory_N[start : start + one.nbytes].view(one.dtype).view(one.shape)
            self._copies[one.data_ptr()] = one, copy
        self._reading = self._threads.submit(_copy, list(self._copies.values()))

    def of(self, weight: Tensor) -> Tensor:
        """The copy of a weight, or itself where it was not read."""
        self._finish()
        found = self._copies.get(weight.data_ptr())
        return weight if found is None or found[0].shape != weight.shape else found[1]

    def _finish(self) -> None:
        if self._reading is not None:
            self._reading.result()
            self._reading = None


@torch.no_grad()
def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for weight, copy in pairs:
        copy.copy_(weight)
