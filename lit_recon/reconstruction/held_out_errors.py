"""Held-out errors of a window, taken from the validations that its Trainer makes anyway, not in passes of their own.

Lightning's sanity check sees the pruned window, the last validation often what is kept. What the window outputs there
is measured as `Activations` measures it, and remembered by the values of the weights: where those are others when
errors are asked for (rounded, restored, merged with adapters, moved as the fit ended), a pass is made after all.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_recon.activations.datamodule import Activations, Batch
from lit_recon.activations.steps import TrainingData
from lit_recon.model.errors import Errors
from lit_recon.model.windows import AnyWindow
from lit_recon.system.finite import NotFinite

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


class HeldOutErrors(Callback):
    """Errors of one window on held-out samples, over all its tries; and the start of its held-out curve, at step 0.

    The start is measured by the sanity check of the first try, before which Lightning logs nothing; later tries begin
    with the same weights, and need none.

    Args:
        window: The window, pruned.
        data: What it is trained on.
        unit: Of its errors.

    Attributes:
        metrics: What the module logged of the first try's start, where later ones need not measure it again.
    """

    def __init__(self, window: AnyWindow, data: TrainingData, unit: float) -> None:
        self.window, self.data, self.unit = window, data, unit
        self.metrics: dict[str, Tensor] = {}
        self._start: Errors | None = None
        self._known: dict[tuple[int, ...], Errors] = {}  # by the weights' values
        self._own = _parameters(window)
        self._is_observed = False
        self._batch: Batch | None = None  # of a validation, while the module looks at it
        self._outputs: Tensor | None = None
        self._found: list[Tensor] = []
        self._samples = 0

    def at_start(self) -> Errors:
        """Those of the pruned window, which it still is unless a try has been made.

        Raises:
            NotFinite: They are not finite.
        """
        if self._start is None:
            self._start = check_finite(self.window, "held-out", self.now())
        return self._start

    def now(self) -> Errors:
        """Those of the window as it is."""
        found = self._known.get(self._values()) if self._known else None
        return self.data.held_out_errors(self.window, self.unit) if found is None else found

    @contextmanager
    def observing(self, module: LightningModule) -> Iterator[None]:
        """A context for a fit, in which validations are observed if what they run is the window and nothing else."""
        own = {id(one) for one in self._own}
        self._is_observed = (
            isinstance(self.data, Activations)
            and not hasattr(module, "attached")
            and all(id(one) in own for one in module.parameters())
        )
        if not self._is_observed:
            self.at_start()  # before the window computes with adapters
            yield
            return
        hook = self.window.register_forward_hook(self._take)
        try:
            yield
        finally:
            hook.remove()
            self._forget()
            for name in ("log", "log_dict"):  # the module's, which Lightning puts there
                vars(self).pop(name, None)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._forget()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Know the batch by which the window's outputs are told from others."""
        self._batch = batch if self._is_observed and isinstance(batch, Batch) else None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure what the window output."""
        if self._batch is not None and self._outputs is not None:
            assert isinstance(self.data, Activations)
            self._found.append(self.data.by_token(self.window, self._batch, self._outputs, self.unit))
            self._samples += len(self._batch.inputs_BTD)
        self._batch = self._outputs = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the errors, if all samples were seen."""
        if isinstance(self.data, Activations) and self._samples == self.data.num_held_out:
            self._known[self._values()] = Errors.from_tokens(torch.cat(self._found))
        self._forget()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of the pruned window, which Lightning does not."""
        if self._known:  # else nothing tells that the next try will find the same
            self.at_start()
            self.metrics = dict(trainer.callback_metrics)
        _log(trainer, trainer.callback_metrics)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the start's metrics where they were known; measure the start if no validation has."""
        if self.metrics and trainer.num_sanity_val_steps == 0:
            _log(trainer, self.metrics)
        if self._start is None:
            modes = [(one, one.training) for one in self.window.modules()]
            self.window.eval()
            self.at_start()
            for one, mode in modes:
                one.training = mode

    def _take(self, window: nn.Module, args: tuple[Any, ...], outputs: Tensor) -> None:
        """Take the window's outputs for the batch of a validation, made with its own weights."""
        if self._batch is None or len(args) != 2:
            return
        is_whole = args[0] is self._batch.inputs_BTD and args[1] is self._batch.calls
        if is_whole and all(one is own for one, own in zip(_parameters(self.window), self._own, strict=True)):
            self._outputs = outputs

    def _values(self) -> tuple[int, ...]:
        """Sums of the weights' bits, which change with any of them."""
        sums = [one.detach().view(_WORDS[one.element_size()]).sum() for one in self._own]
        return tuple(torch.stack(sums).tolist())

    def _forget(self) -> None:
        self._batch = self._outputs = None
        self._found, self._samples = [], 0


def check_finite(window: AnyWindow, samples: str, errors: Errors) -> Errors:
    """The errors of a window that is not yet trained.

    Raises:
        NotFinite: They are not finite.
    """
    if not math.isfinite(errors.mean):
        raise NotFinite(f"{window.name}: its error on {samples} samples, pruned, is not finite ({errors.mean})")
    return errors


def _parameters(window: AnyWindow) -> list[nn.Parameter]:
    """All parameters that a window computes with, those of a half that are its layer's own among them."""
    return list({id(one): one for one in (*window.own_parameters(), *window.parameters())}.values())


def _log(trainer: Trainer, metrics: dict[str, Tensor]) -> None:
    if trainer.logger is not None:
        trainer.logger.log_metrics({name: float(value) for name, value in metrics.items()}, 0)
