"""Callbacks of a window's Trainer: its learning rate, the start of its curves, the guard against divergence."""

import math
from typing import Any

from lightning import Callback, LightningModule, Trainer


class LearningRate(Callback):
    """Logs the learning rate as `lr`, and scales it by `factor`, for any module and optimizer.

    Args:
        factor: 1, or less after a fit that failed.
    """

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale the rate of every parameter group, and what the schedulers start from."""
        if self.factor == 1.0:
            return
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for rate in {"lr", "initial_lr", "max_lr", "min_lr"} & set(group):  # the last two: OneCycleLR
                    group[rate] *= self.factor
        for config in trainer.lr_scheduler_configs:
            if hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = [rate * self.factor for rate in config.scheduler.base_lrs]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the rate with which this batch will be used."""
        for group in [group for optimizer in trainer.optimizers for group in optimizer.param_groups][:1]:
            pl_module.log("lr", group["lr"], batch_size=1)


class FirstHeldOut(Callback):
    """Starts the held-out curve at step 0: what Lightning's sanity check measures before training, it does not log."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of the pruned window."""
        if trainer.logger is not None:
            trainer.logger.log_metrics({name: float(value) for name, value in trainer.callback_metrics.items()}, 0)


class FiniteLoss(Callback):
    """Ends a fit whose loss is not finite; `diverged` says so to the WindowFitter."""

    def __init__(self) -> None:
        self.diverged = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss as often as losses are logged: reading it makes a GPU wait."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs  # a step may have none
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if loss is not None and batch_idx % every == 0 and not math.isfinite(float(loss)):
            self.diverged = trainer.should_stop = True
