"""The teacher: a window with its dense weights, which recomputes targets for each batch.

Its weights are kept once, on the device, and stand in the place of those that are trained while targets are made.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lit_recon.activations.propagation import Propagation
from lit_recon.model.decoder import LayerCall
from lit_recon.model.windows import AnyWindow, Window, has_parallel_halves
from lit_recon.system.device import Compute


class TeacherWindow:
    """A window with its dense weights.

    Args:
        window: The window, dense now, and on the device.
        compute: Device and precision.
    """

    def __init__(self, window: Window, compute: Compute) -> None:
        self.window, self.compute = window, compute
        self._weights = [(parameter, parameter.detach().clone()) for parameter in window.parameters()]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """A context in which the window is dense; what it has learnt, with gradients, returns afterwards."""
        now = [parameter.data for parameter, _ in self._weights]
        for parameter, dense in self._weights:
            parameter.data = dense
        try:
            yield
        finally:
            for (parameter, _), data in zip(self._weights, now, strict=True):
                parameter.data = data

    @torch.no_grad()
    def __call__(self, hidden_BTD: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        """What the dense window makes of hidden states at its start, (B, T, D) in float32."""
        with self.installed(), self.compute.autocast():
            return self.window(hidden_BTD, calls).float()


def check_halves(windows: Sequence[AnyWindow], propagation: Propagation, *, recompute: bool) -> None:
    """Raise a ValueError for halves of parallel layers of which targets, made anew for each batch, would be others."""
    if recompute and propagation.corrects and has_parallel_halves(windows):
        raise ValueError(
            f"store.targets=recompute with windows=half and chain.inputs={propagation.inputs}: the halves of these "
            "layers stand side by side, and targets of the second depend on what the first has learnt; use "
            "store.targets=keep, or windows=block."
        )
