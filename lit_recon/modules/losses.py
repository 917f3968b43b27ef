"""Losses between a window's outputs and its targets: one number per token, of which a module takes the mean.

    loss(outputs_ND, targets_ND, *, energies_N, unit) -> (N)

`unit` is the median over tokens of the energy of the window's dense update (its output minus its input; of a matrix,
its product), `energies_N` that energy of each token. In this unit curves of windows at different depth compare, and one
learning rate or clipping threshold means the same everywhere: 1 is the error of leaving the window out, at a typical
token. The divergence of logits is in nats.

Those of TARGETS are for all layers at once (walk=global): they say what the model is to be compared with.

Shapes: B samples, T tokens of each, N tokens without padding, D features, V vocabulary.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lit_recon.activations.datamodule import Batch
from lit_recon.model.head import cross_entropies, kl_divergences

_LEAST = 1e-6  # of the unit: energies that are divided by are not taken for smaller


def mean_squared(outputs_ND: Tensor, targets_ND: Tensor, *, energies_N: Tensor, unit: float) -> Tensor:
    """Squared error over the unit (arXiv 2510.14444, but for the unit): e / s."""
    return _squared(outputs_ND, targets_ND) / unit


def balanced(outputs_ND: Tensor, targets_ND: Tensor, *, energies_N: Tensor, unit: float) -> Tensor:
    """Squared error over the unit, of tokens with a larger update s_t over the geometric mean: e / sqrt(s max(s, s_t)).

    Tokens with massive activations keep more than their share, and the others learn.
    """
    return _squared(outputs_ND, targets_ND) / (unit * energies_N.clamp(min=unit)).sqrt()


def relative(outputs_ND: Tensor, targets_ND: Tensor, *, energies_N: Tensor, unit: float) -> Tensor:
    """Squared error over the energy of the token's target: every token counts by the share of it that is wrong."""
    return _squared(outputs_ND, targets_ND) / targets_ND.square().mean(-1).clamp(min=_LEAST * unit)


def cosine(outputs_ND: Tensor, targets_ND: Tensor, *, energies_N: Tensor, unit: float) -> Tensor:
    """One minus the cosine of the angle between output and target; blind to their lengths."""
    return 1 - functional.cosine_similarity(_widened(outputs_ND), targets_ND, dim=-1)


def huber(outputs_ND: Tensor, targets_ND: Tensor, *, energies_N: Tensor, unit: float, delta: float = 1.0) -> Tensor:
    """Pseudo-Huber loss of each token's error, in units: squared up to about `delta`^2, linear in its root beyond.

    Charbonnier, Blanc-Feraud, Aubert and Barlaud, "Deterministic edge-preserving regularization in computed imaging",
    IEEE Transactions on Image Processing 6 (1997); times 2, so that small errors count as in `mean_squared`.

    Raises:
        ValueError: `delta` is not above 0.
    """
    if not delta > 0:
        raise ValueError(f"loss.delta={delta}: expected a number above 0, such as 1.")
    squared_N = _squared(outputs_ND, targets_ND) / unit
    return 2 * squared_N / ((1 + squared_N / delta**2).sqrt() + 1)  # 2 d^2 (sqrt(1 + e / d^2) - 1) without cancellation


def kl_divergence(
    outputs_ND: Tensor, targets_ND: Tensor, *, energies_N: Tensor, unit: float, head: Callable[[Tensor], Tensor]
) -> Tensor:
    """Kullback-Leibler divergence of the logits from the dense model's, in nats; `energies_N` and `unit` are not used.

    Args:
        outputs_ND: Hidden states after the last layer.
        targets_ND: The dense model's.
        energies_N: Not used; the other losses' weights.
        unit: Not used; theirs too.
        head: Makes logits (1, N, V) of hidden states (1, N, D).
    """
    return kl_divergences(outputs_ND, targets_ND, head=head)


def cross_entropy(
    outputs_ND: Tensor, targets_N: Tensor, *, energies_N: Tensor, unit: float, head: Callable[[Tensor], Tensor]
) -> Tensor:
    """Negative log-likelihood of each next token, in nats; `energies_N` and `unit` are not used.

    Args:
        outputs_ND: Hidden states after the last layer, of tokens that have a next one.
        targets_N: The next tokens.
        energies_N: Not used; the other losses' weights.
        unit: Not used; theirs too.
        head: Makes logits (1, N, V) of hidden states (1, N, D).
    """
    return cross_entropies(outputs_ND, targets_N, head=head)


def hidden_states(outputs_ND: Tensor, targets_ND: Tensor, *, energies_N: Tensor, unit: float) -> Tensor:
    """Squared error of the hidden states after every layer, each in the unit of its layer, a mean over layers.

    The features are those of all layers side by side, over the roots of their units (DecoderWindow.units).
    """
    return mean_squared(outputs_ND, targets_ND, energies_N=energies_N, unit=unit)


TARGETS: dict[Callable[..., Tensor], str] = {  # of losses of the whole model: what the outputs are compared with
    cross_entropy: "tokens",
    kl_divergence: "logits",
    hidden_states: "all states",
}


def targets_of(loss: Callable[..., Any]) -> str:
    """What a loss compares the outputs with: one of TARGETS, or "states", the hidden states at the window's end."""
    while isinstance(loss, partial):
        loss = loss.func
    return TARGETS.get(loss, "states")


def with_head(loss: Callable[..., Tensor], head: Callable[[Tensor], Tensor] | None) -> Callable[..., Tensor]:
    """A loss on the logits of a window's outputs, where it has a head: the divergence, unless it takes one itself."""
    if head is None:
        return loss
    return partial(loss if "head" in inspect.signature(loss).parameters else kl_divergence, head=head)


def after_first(batch: Batch, *, positions: int = 1) -> Tensor:
    """Weights of tokens (B, T) that leave out the first positions of each sample, where attention sinks stand."""
    weights_BT = torch.ones(batch.inputs_BTD.shape[:2], device=batch.inputs_BTD.device)
    weights_BT[:, :positions] = 0
    return weights_BT


def _squared(outputs_ND: Tensor, targets_ND: Tensor) -> Tensor:
    """Squared error of each token, a mean over features, in float32 at least."""
    return (_widened(outputs_ND) - targets_ND).square().mean(-1)


def _widened(outputs_ND: Tensor) -> Tensor:
    """Outputs that may have 16 bits, under autocast, in float32."""
    return outputs_ND.to(torch.promote_types(outputs_ND.dtype, torch.float32))
