"""What a LightningModule trains of its window, and what it changes there; a module that says nothing trains all of it.

    trained()    parameters with gradients and states of an optimizer: of the window, or adapters of the module's own
    changed()    parameters of the window that have other values after the fit: these are copied, rounded, put back
    attached()   a context for the fit, within which the window computes with adapters; merged as it ends well

A module has these methods or not. `trained` is asked within `attached`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from lightning import LightningModule
from torch import nn

from lit_recon.model.windows import AnyWindow


def trained_by(module: LightningModule, window: AnyWindow) -> Sequence[nn.Parameter]:
    """The parameters that a module trains; the window's own where it does not say."""
    return getattr(module, "trained", window.own_parameters)()


def changed_by(module: LightningModule, window: AnyWindow) -> Sequence[nn.Parameter]:
    """The parameters of the window that a module changes; the window's own where it does not say."""
    return getattr(module, "changed", window.own_parameters)()


def attached(module: LightningModule) -> AbstractContextManager:
    """A context in which the window computes with what the module trains."""
    return getattr(module, "attached", nullcontext)()


def needs_gram(module: Callable[..., LightningModule]) -> bool:
    """Whether a module, or a partial call of its class, is trained on normal equations, not on activations."""
    return getattr(getattr(module, "func", module), "needs_gram", False)
