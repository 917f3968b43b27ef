"""No training: windows keep their pruned weights, or those that `start` gives them."""

from collections.abc import Mapping

from lightning import LightningModule
from torch import Tensor, nn

from lit_recon.model.windows import AnyWindow


class Untrained(LightningModule):
    """One window of which nothing is trained.

    Args:
        window: The pruned window.
        masks: Not used.
        unit: Not used.
    """

    def __init__(self, window: AnyWindow, masks: Mapping[str, Tensor], unit: float) -> None:
        super().__init__()

    def trained(self) -> list[nn.Parameter]:
        """Nothing."""
        return []

    def changed(self) -> list[nn.Parameter]:
        """Nothing."""
        return []
