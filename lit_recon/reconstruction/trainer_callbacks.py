"""Callbacks of a window's Trainer: its learning rate, and which state is kept."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lit_recon.modules.curves import Curves
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.system.transfer import LateNumber

HELD_OUT = "loss/held_out"
_REMEMBERED = ("kept_step", "stopped_early", "halved", "diverged", "_least", "_worse", "_seen", "_halved_at", "_notes")


class LearningRate(Callback):
    """Logs the learning rate as `lr`, and scales it by `factor`, for any module and optimizer.

    Args:
        factor: 1, or less after a fit that failed.
    """

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self._curves = Curves()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale the rate of every parameter group, and what the schedulers start from."""
        if self.factor != 1.0:
            scale_rates(trainer, self.factor)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the rate with which this batch will be used."""
        for group in [group for optimizer in trainer.optimizers for group in optimizer.param_groups][:1]:
            self._curves.note({"lr": group["lr"]})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log it."""
        self._curves.log(trainer)


class KeptState(Callback):
    """Keeps the best state of what is trained, ends a fit that improves no more, and returns from a loss not finite.

    From such a loss a fit returns once to the state that is kept, the start of the fit or the best so far, and goes on
    at half the rate, with an optimizer that remembers nothing; the second one ends it.

    Args:
        fitting: What is kept, and the patience.
        start: By `id` of a parameter, its value at the start, where there is a copy already.
        metrics: What the module logs of the start, where that is known and no sanity check is made.

    Attributes:
        kept_step: After how many steps what is kept was reached.
        stopped_early: Whether the patience was at its end.
        halved: Whether the rate was halved.
        diverged: Whether the loss was not finite once more.
    """

    def __init__(
        self, fitting: FitSettings, start: Mapping[int, Tensor], metrics: Mapping[str, Tensor] | None = None
    ) -> None:
        self._metrics = metrics or {}
        self.best, self.patience, self._start = fitting.keep == "best", fitting.patience, start
        self.kept_step, self.stopped_early, self.halved, self.diverged = 0, False, False, False
        self._least, self._worse, self._seen, self._halved_at = math.inf, 0, False, -1
        self._state: list[tuple[Tensor, Tensor]] = []
        self._loss: LateNumber | None = None  # that was looked at and not yet read
        self._notes: list[str] = []

    @property
    def note(self) -> str:
        """What is unusual of these, in words; nothing of a fit that came to nothing."""
        return "" if self.diverged else "; ".join(self._notes)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the state at the start."""
        for one in (parameter for parameter in pl_module.parameters() if parameter.requires_grad):
            known = None if self.best else self._start.get(id(one))
            self._state.append((one, one.detach().clone() if known is None else known))

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the loss on held-out samples before the first step."""
        self._look(trainer, pl_module, trainer.callback_metrics)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what is known of it."""
        if self._metrics:
            self._look(trainer, pl_module, self._metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the loss on held-out samples."""
        if not trainer.sanity_checking:
            self._seen = True
            self._look(trainer, pl_module, trainer.callback_metrics)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss as often as losses are logged; of a GPU, which would have to wait, at the one before."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs  # a step may have none
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if loss is None or batch_idx % every:
            return
        read, self._loss = self._loss, LateNumber(loss.detach())
        if self._loss.is_there:
            read, self._loss = self._loss, None
        if read is not None and not math.isfinite(read.value()):
            self._return(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the best state; to none where there was no look after the start."""
        self.diverged |= self._halved_at == trainer.global_step  # no step was left
        if self.best and self._seen and not self.diverged and self.kept_step != trainer.global_step:
            self._restore()
            self._notes.append(f"kept the best state, that after {self.kept_step} of {trainer.global_step} steps")
        else:
            self.kept_step = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, and the best state; no tensors where that is the start, which each fit has anew."""
        best = [state for _, state in self._state] if self.best and self.kept_step else []
        return {name: getattr(self, name) for name in _REMEMBERED} | {"best": best}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what `state_dict` gave, in a fit that starts where that one did."""
        for name in _REMEMBERED:
            setattr(self, name, state_dict[name])
        if state_dict["best"]:
            for (_, state), best in zip(self._state, state_dict["best"], strict=True):
                state.copy_(best)

    def _look(self, trainer: Trainer, module: LightningModule, metrics: Mapping[str, Tensor]) -> None:
        found = metrics.get(HELD_OUT)
        if found is None:
            if self.best or self.patience:
                raise ValueError(f"keep=best and patience need {HELD_OUT}, which {type(module).__name__} does not log")
        elif not math.isfinite(float(found)):
            self._return(trainer)
        elif float(found) < self._least:
            self._least, self._worse, self.kept_step = float(found), 0, trainer.global_step
            if self.best:
                for parameter, state in self._state:
                    state.copy_(parameter.detach())
        else:
            self._worse += 1
            if self._worse == self.patience:
                self.stopped_early = trainer.should_stop = True
                self._notes.append(f"stopped after {trainer.global_step} steps: {HELD_OUT} had become no smaller")

    def _return(self, trainer: Trainer) -> None:
        self._loss = None  # of the state that is left
        if self.halved or not trainer.optimizers:
            self.diverged = trainer.should_stop = True
            return
        self.halved, self._halved_at = True, trainer.global_step
        self._notes.append(f"the loss was not finite within {trainer.global_step} steps: went on at half the rate")
        self._restore()
        scale_rates(trainer, 1 / 2)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
            optimizer.zero_grad()  # what a step would still be accumulated on

    @torch.no_grad()
    def _restore(self) -> None:
        for parameter, state in self._state:
            parameter.copy_(state)


def scale_rates(trainer: Trainer, factor: float) -> None:
    """Scale the rate of every parameter group, and what the schedulers start from."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for rate in {"lr", "initial_lr", "max_lr", "min_lr"} & set(group):  # the last two: OneCycleLR
                group[rate] *= factor
    for config in trainer.lr_scheduler_configs:
        if hasattr(config.scheduler, "base_lrs"):
            config.scheduler.base_lrs = [rate * factor for rate in config.scheduler.base_lrs]
