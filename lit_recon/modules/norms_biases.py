"""Norms and biases: train these few parameters by gradient descent, and no matrix (PERP, arXiv 2312.15230).

What is trained is 0.01% to 0.1% of a model, so that gradients and the optimizer's moments take no memory to speak of.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lit_recon.model.windows import AnyWindow
from lit_recon.modules.masked_weights import MaskedWeights


class NormsBiases(MaskedWeights):
    """One window of which only norms and biases are trained.

    Args:
        window: The pruned window; its parameters are float32.
        masks: Not used: no matrix is trained.
        unit: Unit of the loss.
        **settings: Those of MaskedWeights.
    """

    def __init__(self, window: AnyWindow, masks: Mapping[str, Tensor], unit: float, **settings: Any) -> None:
        super().__init__(window, {}, unit, **settings)

    def trained(self) -> list[nn.Parameter]:
        """What is trained: norms and biases."""
        return self.vectors
