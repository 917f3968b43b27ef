"""Norms and biases: train these few parameters by gradient descent, and no matrix (PERP, arXiv 2312.15230).

What is trained is 0.01% to 0.1% of a model, so that gradients and the optimizer's moments take no memory to speak of.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_recon.model.biases import add_biases
from lit_recon.model.windows import AnyWindow
from lit_recon.modules.masked_weights import MaskedWeights


class NormsBiases(MaskedWeights):
    """One window of which only norms and biases are trained.

    Args:
        window: The pruned window; its parameters are float32.
        masks: Not used: no matrix is trained.
        unit: Unit of the loss.
        add_biases: Whether the model is to be given biases first, where it has none (`prepare_model`).
        **settings: Those of MaskedWeights.
    """

    def __init__(
        self,
        window: AnyWindow,
        masks: Mapping[str, Tensor],
        unit: float,
        *,
        add_biases: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(window, {}, unit, **settings)

    def trained(self) -> list[nn.Parameter]:
        """What is trained: norms and biases."""
        return self.vectors


def prepare_model(model: PreTrainedModel, module: Callable[..., Any]) -> None:
    """Add biases to a model, or to its skeleton, where a module asks for them.

    Raises:
        ValueError: The model's configuration has no switch for them.
    """
    if getattr(module, "keywords", {}).get("add_biases") is True and _is_one(getattr(module, "func", None)):
        add_biases(model)


def _is_one(made: Any) -> bool:
    return isinstance(made, type) and issubclass(made, NormsBiases)
