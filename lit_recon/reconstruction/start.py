"""Least squares as the start of a window's training: every matrix solved for on its mask's support, then trained.

Solve, then train (3BASiL, arXiv 2603.01376). The solution of each matrix gives its dense products on the inputs that it
has in the dense window. Together they are a start if they make the window better on held-out samples; otherwise it is
trained from its pruned weights.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_recon.activations.steps import TrainingData
from lit_recon.activations.window_grams import Grams
from lit_recon.model.errors import Errors
from lit_recon.model.windows import AnyWindow
from lit_recon.modules.conjugate_gradients import solve_damped
from lit_recon.reconstruction.fitted_weights import FittedWeights
from lit_recon.reconstruction.rate_search import Try

_LIMITS = {"tolerance": 1e-3, "max_iterations": 200}  # conf/module/least_squares.yaml


@torch.no_grad()
def solutions(window: AnyWindow, masks: Mapping[str, Tensor], grams: Grams) -> dict[str, Tensor]:
    """The solution of each matrix by name, of those whose inputs were observed.

    Args:
        window: The window with its dense weights.
        masks: Their masks (True = kept).
        grams: Of their inputs.
    """
    found = {}
    for matrix in window.matrices():
        sums = grams.of(matrix) if matrix.name in masks else None
        if sums is not None:
            pairs = zip(matrix.by_expert(matrix.weight), matrix.by_expert(masks[matrix.name]), sums, strict=True)
            solved = [_solved(weight_OI, mask_OI, one.gram_II.double()) for weight_OI, mask_OI, one in pairs]
            found[matrix.name] = matrix.as_weight(torch.stack(solved))
    return found


def _solved(weight_OI: Tensor, mask_OI: Tensor, gram_II: Tensor) -> Tensor:
    """The solution of one matrix; its pruned weights where its Gram matrix has none."""
    try:
        return solve_damped(weight_OI, mask_OI, gram_II, weight_OI.double() @ gram_II, **_LIMITS)[0]
    except torch.linalg.LinAlgError:
        return weight_OI * mask_OI


@torch.no_grad()
def begin(
    window: AnyWindow,
    start: Mapping[str, Tensor],
    weights: FittedWeights,
    data: TrainingData,
    unit: float,
    before: Errors,
) -> Try:
    """Put solutions in their places; the pruned weights return where these are better.

    Args:
        window: The pruned window.
        start: The solutions, by matrix.
        weights: What of the window is changed, these matrices among it.
        data: What the window is measured on.
        unit: Of its errors.
        before: Its held-out errors.

    Returns:
        A try without training, at rate 0.
    """
    for matrix in window.matrices():
        if matrix.name in start:
            matrix.weight.copy_(start[matrix.name])
    weights.round()
    calibration, held_out = data.errors(window, unit)
    tried = Try(rate=0.0, before=before, held_out=held_out, calibration=calibration, diverged=False, steps=0, lost=0.0)
    if tried.accepted:
        weights.start = weights.copies()
    else:
        weights.restore(weights.start)
    return tried
