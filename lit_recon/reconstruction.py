"""Win back what pruning cost a window: the step of the walk that trains.

A reconstruction is accepted if the error on held-out samples became smaller; otherwise the window keeps its pruned
weights. A fit that diverges starts again from them once, with half the learning rate.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lit_recon.activations import Activations
from lit_recon.callbacks import FiniteLoss, FirstHeldOut, LearningRate
from lit_recon.logger import RunLogger
from lit_recon.moments import Moments
from lit_recon.windows import AnyWindow

log = logging.getLogger(__name__)

DIVERGED = "loss was not finite, also at half the learning rate: kept its pruned weights"
NOT_BETTER = "held-out error did not improve: kept its pruned weights"


@dataclass(frozen=True)
class WindowResult:
    """What became of one window.

    Errors are mean squared errors over the variance of the targets, on calibration and on held-out samples; those of a
    window whose loss is on the logits are Kullback-Leibler divergences, in nats per token, as `measure` says.
    """

    name: str
    relative_error_before: float
    relative_error_after: float
    held_out_before: float
    held_out_after: float
    accepted: bool
    steps: int
    seconds: float
    note: str = ""
    measure: str = "relative error"


def uses_moments(module: Callable[..., LightningModule]) -> bool:
    """Whether a module, or a partial call of its class, is fed with moments (lit_recon.moments), not activations."""
    return getattr(getattr(module, "func", module), "uses_moments", False)


class Reconstructor:
    """Fits windows, each with a LightningModule and a Trainer of its own.

    Args:
        module: Makes the LightningModule from (window, masks, variance).
        trainer: Makes the Trainer from `callbacks` and `logger`.
        logger: The run's log.
        device: Where windows are trained.
        seed: Seed of the order of the samples; each window adds its index.
        callbacks: Callbacks of every Trainer, for example a progress display.
    """

    def __init__(
        self,
        module: Callable[..., LightningModule],
        trainer: Callable[..., Trainer],
        *,
        logger: RunLogger,
        device: torch.device,
        seed: int,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.module = module
        self.trainer = trainer
        self.logger = logger
        self.device = device
        self.seed = seed
        self.callbacks = list(callbacks)

    def fit(self, window: AnyWindow, masks: Mapping[str, Tensor], data: Activations | Moments) -> WindowResult:
        """Train a pruned window towards its targets; keep the result if it is better on held-out samples."""
        start = time.perf_counter()
        variance = data.variance()
        before, held_out_before = after, held_out_after = data.errors(window, variance)
        pruned = [parameter.detach().clone() for parameter in window.trained()]
        note, steps = DIVERGED, 0
        for factor in (1.0, 0.5):
            steps, diverged = self._train(self.module(window, masks, variance), window, data, factor)
            after, held_out_after = data.errors(window, variance)
            if not diverged and math.isfinite(held_out_after):
                note = "" if factor == 1.0 else "loss was not finite: reconstructed at half the learning rate"
                break
            log.warning("%s: the loss was not finite; the window is restored.", window.name)
            _restore(window, pruned)
            after, held_out_after, steps = before, held_out_before, 0
        accepted = held_out_after < held_out_before
        if not accepted:
            _restore(window, pruned)
            after, note = before, DIVERGED if note == DIVERGED else NOT_BETTER
        _check_zeros(window, masks)
        self.logger.end_window()
        return WindowResult(
            window.name,
            before,
            after,
            held_out_before,
            held_out_after,
            accepted,
            steps,
            round(time.perf_counter() - start, 3),
            note,
            "relative error" if window.head is None else "KL divergence",
        )

    def _train(
        self, module: LightningModule, window: AnyWindow, data: Activations | Moments, factor: float
    ) -> tuple[int, bool]:
        """Fit once; how many steps the optimizer made, and whether the loss diverged."""
        guard = FiniteLoss()
        self.logger.start_window(window.name)
        trainer = self.trainer(
            logger=self.logger,
            callbacks=[LearningRate(factor), FirstHeldOut(), guard, *self.callbacks],
            **data.trainer_settings,
        )
        for parameter in window.trained():
            parameter.requires_grad_(True)
        try:
            with _interruptible():
                trainer.fit(module, datamodule=data.data_module(self.seed + window.indices.start))
        finally:
            window.requires_grad_(False)
            window.zero_grad(set_to_none=True)
        window.to(self.device)  # the Trainer's teardown moved it to the CPU
        return trainer.global_step, guard.diverged


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn what Lightning makes of Ctrl-C (SystemExit, and SIGINT ignored from then on) back into KeyboardInterrupt."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


@torch.no_grad()
def _restore(window: AnyWindow, weights: Sequence[Tensor]) -> None:
    for parameter, weight in zip(window.trained(), weights, strict=True):
        parameter.copy_(weight)


def _check_zeros(window: AnyWindow, masks: Mapping[str, Tensor]) -> None:
    """Raise if training moved a pruned weight: only an optimizer that mixes weights of one matrix can do that."""
    for matrix in window.matrices():
        if matrix.name in masks and torch.count_nonzero(matrix.weight[~masks[matrix.name]]):
            raise RuntimeError(
                f"{window.name}: the optimizer moved pruned weights of {matrix.name}. Use an elementwise optimizer "
                "(AdamW, SGD), or multiply the weights by their masks in your module's optimizer_step."
            )
