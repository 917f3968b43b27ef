"""Block influence: how much a block changes the hidden states that it is given.

    BI = 1 - mean over tokens of cos(input, output)      (ShortGPT: Men et al., arXiv 2403.03853)

A block whose input and output are almost alike does little, and what pruning costs it matters less.

Shapes: S samples, B samples of a batch, T tokens, D hidden size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lit_recon.activations.passes import CALIBRATION, Passes
from lit_recon.model.decoder import LayerCall
from lit_recon.model.layerwise import float32_on
from lit_recon.model.windows import Window


class _Observed:
    """A window whose cosines are summed while it is run."""

    def __init__(self, window: Window) -> None:
        self.window, self.total, self.count = window, 0.0, 0

    def __call__(self, inputs_BTD: Tensor, calls: list[LayerCall]) -> Tensor:
        """The outputs, (B, T, D)."""
        outputs_BTD = self.window(inputs_BTD, calls)
        cosines_BT = functional.cosine_similarity(inputs_BTD.float(), outputs_BTD.float(), dim=-1)
        self.total += float(cosines_BT.double().sum())
        self.count += cosines_BT.numel()
        return outputs_BTD


@torch.no_grad()
def block_influence(windows: Sequence[Window], passes: Passes, states_STD: Tensor) -> list[float]:
    """The influence of each window, from 0 (it changes no direction) to 2, by one pass of calibration samples.

    Args:
        windows: Dense windows one after the other, which do not overlap.
        passes: Runs them.
        states_STD: Hidden states before the first of them; not changed.

    Raises:
        NotFinite: An output is not finite.
    """
    found, states_STD = [], passes.copy(states_STD)
    for window in windows:
        observed = _Observed(window)
        with float32_on(window, passes.compute.device):
            passes.run(observed, states_STD, states_STD, (), CALIBRATION)
        found.append(1 - observed.total / observed.count)
    return found


def most_alike(influences: Sequence[float], share: float) -> list[int]:
    """Indices of a share of the windows, rounded down: those of the least influence."""
    order = sorted(range(len(influences)), key=lambda index: influences[index])
    return sorted(order[: math.floor(share * len(influences) + 1e-9)])  # 0.58 of 50 are 29
