"""Training curves that no step waits for: what a step finds is handed to the logger as it is, maybe not computed yet.

`LightningModule.log` reads each value from a GPU where it is written, every few steps of a fit, and while it is read no
further step is prepared. A logger with `log_later` (reconstruction/tensorboard.py) reads many at once.
"""

from collections.abc import Mapping

from lightning import Trainer
from torch import Tensor


class Curves:
    """What the steps of a fit found, logged as often as the Trainer asks."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor | float] = {}
        self._steps = 0

    def note(self, found: Mapping[str, Tensor | float]) -> None:
        """Note what a batch found; of the batches of one step the last one counts, as Lightning has it."""
        self._found |= found

    def log(self, trainer: Trainer) -> None:
        """At the end of each batch: log what was noted, if that made a step, and one that is due."""
        step, self._steps = self._steps, trainer.global_step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._steps == step or trainer.logger is None or not self._found:
            return
        if (step + 1) % every == 0 or trainer.should_stop:
            found, self._found = self._found, {}
            if hasattr(trainer.logger, "log_later"):
                trainer.logger.log_later(found, step)
            else:
                trainer.logger.log_metrics({name: float(value) for name, value in found.items()}, step)
