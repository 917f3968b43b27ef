"""Losses between a window's outputs and its targets: functions of (outputs, targets, variance) to one number.

Those of hidden states are in units of the targets' spread, so that curves of windows at different depth can be compared
and one learning rate or clipping threshold means the same everywhere: 1 is the squared error of predicting the mean.
The divergence of logits is in nats per token.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from lit_recon.model.head import kl_divergence_sum


def mean_squared(outputs_BTD: Tensor, targets_BTD: Tensor, *, variance: float) -> Tensor:
    """Mean squared error over the variance of the targets: the relative error (arXiv 2510.14444)."""
    return functional.mse_loss(outputs_BTD.float(), targets_BTD) / variance


def kl_divergence(outputs: Tensor, targets: Tensor, *, variance: float, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Kullback-Leibler divergence of the logits from the dense model's, in nats per token; `variance` is not used.

    Args:
        outputs: Hidden states after the last layer, (..., D).
        targets: The dense model's.
        variance: Not used; the other losses' unit.
        head: Makes logits (1, N, V) of hidden states (1, N, D).
    """
    return kl_divergence_sum(outputs, targets, head=head) / (targets.numel() // targets.shape[-1])
