"""Losses between a window's outputs and its targets: functions of (outputs, targets, variance) to one number.

Those of hidden states are in units of the targets' spread, so that curves of windows at different depth can be compared
and one learning rate or clipping threshold means the same everywhere: 1 is the squared error of predicting the mean.
The divergence of logits is in nats per token.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

SLICE = 64  # tokens whose logits are there at once: 67 MB of them for a vocabulary of 260,000


def mean_squared(outputs_BTD: Tensor, targets_BTD: Tensor, *, variance: float) -> Tensor:
    """Mean squared error over the variance of the targets: the relative error (arXiv 2510.14444)."""
    return functional.mse_loss(outputs_BTD.float(), targets_BTD) / variance


def mean_absolute(outputs_BTD: Tensor, targets_BTD: Tensor, *, variance: float) -> Tensor:
    """Mean absolute error over the standard deviation of the targets: single large activations weigh less."""
    return functional.l1_loss(outputs_BTD.float(), targets_BTD) / variance**0.5


def kl_divergence(outputs: Tensor, targets: Tensor, *, variance: float, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Kullback-Leibler divergence of the logits from the dense model's, in nats per token; `variance` is not used.

    Args:
        outputs: Hidden states behind the last layer, (..., D).
        targets: The dense model's.
        variance: Not used; the other losses' unit.
        head: Makes logits (1, N, V) of hidden states (1, N, D).
    """
    return kl_divergence_sum(outputs, targets, head=head) / (targets.numel() // targets.shape[-1])


def kl_divergence_sum(outputs: Tensor, targets: Tensor, *, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of the divergences over all tokens, a slice of tokens at a time, so that a large vocabulary fits.

    Backward computes each slice's logits again rather than keep them.
    """

    def divergence(outputs_ND: Tensor, targets_ND: Tensor) -> Tensor:
        with torch.no_grad():
            expected_NV = head(targets_ND[None])[0].float().log_softmax(-1)
        logits_NV = head(outputs_ND[None])[0].float().log_softmax(-1)
        return functional.kl_div(logits_NV, expected_NV, reduction="sum", log_target=True)

    total = outputs.new_zeros((), dtype=torch.float32)
    pairs = zip(outputs.flatten(0, -2).split(SLICE), targets.flatten(0, -2).split(SLICE), strict=True)
    for outputs_ND, targets_ND in pairs:
        total = total + checkpoint(divergence, outputs_ND, targets_ND, use_reentrant=False)
    return total
