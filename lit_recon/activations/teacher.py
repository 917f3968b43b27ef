"""Teachers, which recompute targets for each batch: a window with its dense weights, or all layers of the dense model.

A window's are kept once, on the device, and stand in the place of those that are trained while targets are made. All
layers stay where they are, in files or in memory, in the model's own dtype; one at a time is on the device in float32.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from lit_recon.activations.propagation import Propagation
from lit_recon.model.decoder import LayerCall, call_layer
from lit_recon.model.layerwise import float32_on
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


class TeacherLayers:
    """All layers of the dense model. What is outside of them is never trained, and the student's.

    Args:
        layers: The model's layers, dense now or later pruned.
        dense: The dense tensors of the layer with an index, by their names in it.
        compute: Device and precision.
    """

    def __init__(
        self, layers: Sequence[nn.Module], dense: Callable[[int], Mapping[str, Tensor]], compute: Compute
    ) -> None:
        self.layers = [_with_weights(layer, dense(index)) for index, layer in enumerate(layers)]
        self.compute = compute

    @torch.no_grad()
    def states(self, hidden_BTD: Tensor, calls: Sequence[LayerCall]) -> Iterator[Tensor]:
        """The hidden states after each layer, (B, T, D) in float32, given the embeddings."""
        for layer, call in zip(self.layers, calls, strict=True):
            with float32_on(layer, self.compute.device), self.compute.autocast():
                hidden_BTD = call_layer(layer, hidden_BTD, call)
            yield hidden_BTD.float()

    def __call__(self, hidden_BTD: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        """Hidden states after the last layer."""
        for state_BTD in self.states(hidden_BTD, calls):
            last_BTD = state_BTD
        return last_BTD


def _with_weights(layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A layer of the same kind over other tensors, of which no copy is made."""
    weights = {id(one): nn.Parameter(tensors[name], requires_grad=False) for name, one in layer.named_parameters()}
    return deepcopy(layer, weights)  # type: ignore[arg-type]  # what is in the memo is not copied


def check_halves(windows: Sequence[AnyWindow], propagation: Propagation, *, recompute: bool) -> None:
    """Raise a ValueError for halves of parallel layers of which targets, made anew for each batch, would be others."""
    if recompute and propagation.corrects and has_parallel_halves(windows):
        raise ValueError(
            f"store.targets=recompute with windows=half and chain.inputs={propagation.inputs}: the halves of these "
            "layers stand side by side, and targets of the second depend on what the first has learnt; use "
            "store.targets=keep, or windows=block."
        )
