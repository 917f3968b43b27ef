"""Losses between a window's outputs and its targets: functions of (outputs, targets, variance) to one number.

All are divided by the variance of the targets, so that curves of windows at different depth can be compared and one
learning rate or clipping threshold means the same everywhere: 1 is what predicting the mean would give.
"""

from torch import Tensor
from torch.nn import functional


def mean_squared(outputs_BTD: Tensor, targets_BTD: Tensor, *, variance: float) -> Tensor:
    """Mean squared error over the variance of the targets: the relative error (arXiv 2510.14444)."""
    return functional.mse_loss(outputs_BTD.float(), targets_BTD) / variance


def mean_absolute(outputs_BTD: Tensor, targets_BTD: Tensor, *, variance: float) -> Tensor:
    """Mean absolute error over the standard deviation of the targets: single large activations weigh less."""
    return functional.l1_loss(outputs_BTD.float(), targets_BTD) / variance**0.5
