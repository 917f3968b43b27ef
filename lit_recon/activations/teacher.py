"""Targets that are recomputed for each batch: the window as it was when it was dense, beside the one that is trained.

Its weights are kept once, on the device, and stand in the window's place while targets are made.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lit_recon.activations.propagation import Regime
from lit_recon.model.decoder import LayerCall
from lit_recon.model.windows import AnyWindow, Window, side_by_side
from lit_recon.system.device import Compute


class DenseWindow:
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
        """Have the window dense; its weights of now come back afterwards, with their gradients and optimizer states."""
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


def check_halves(windows: Sequence[AnyWindow], regime: Regime, *, recompute: bool) -> None:
    """Raise a ValueError for halves of parallel layers of which targets, made anew for each batch, would be others."""
    if recompute and regime.corrects and side_by_side(windows):
        raise ValueError(
            f"store.targets=recompute with windows=half and chain.inputs={regime.inputs}: the halves of these layers "
            "stand side by side, and targets of the second depend on what the first has learnt; use "
            "store.targets=keep, or windows=block."
        )
