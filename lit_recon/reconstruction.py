"""Prune one window and win back what it lost: the two steps of the walk that change weights.

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

from lit_recon.activations import ActivationDataModule, Chain
from lit_recon.blocks import Matrix
from lit_recon.callbacks import FiniteLoss, FirstHeldOut, LearningRate
from lit_recon.criteria import Criterion
from lit_recon.logger import RunLogger
from lit_recon.masks import Pattern
from lit_recon.metrics import relative_error
from lit_recon.windows import Window

log = logging.getLogger(__name__)

DIVERGED = "loss was not finite, also at half the learning rate: kept its pruned weights"
NOT_BETTER = "held-out error did not improve: kept its pruned weights"


@dataclass(frozen=True)
class WindowResult:
    """What became of one window; errors are relative errors (see lit_recon.metrics.relative_error)."""

    name: str
    relative_error_before: float
    relative_error_after: float
    held_out_before: float
    held_out_after: float
    accepted: bool
    steps: int
    seconds: float
    note: str = ""


class Statistics:
    """What a criterion gathers of the inputs of some matrices.

    Args:
        criterion: The criterion.
        matrices: The matrices that will be pruned.
    """

    def __init__(self, criterion: Criterion, matrices: Sequence[Matrix]) -> None:
        self.criterion = criterion
        self.by_name = {matrix.name: criterion.start(matrix.rows(matrix.weight)) for matrix in matrices}
        self.watched = [matrix for matrix in matrices if self.by_name[matrix.name] is not None]

    def observe(self, matrix: Matrix, inputs_NI: Tensor) -> None:
        """Add what a watched matrix is multiplied by."""
        self.by_name[matrix.name] = self.criterion.update(self.by_name[matrix.name], inputs_NI)


@torch.no_grad()
def prune(matrices: Sequence[Matrix], statistics: Statistics, pattern: Pattern) -> dict[str, Tensor]:
    """Zero the weights that the criterion finds least important, in place; the masks (True = kept) by matrix name."""
    masks = {}
    for matrix in matrices:
        rows_OI = matrix.rows(matrix.weight)
        scores_OI = statistics.criterion.scores(rows_OI, statistics.by_name[matrix.name])
        mask = matrix.rows(pattern(scores_OI))
        matrix.weight.mul_(mask)
        masks[matrix.name] = mask
    return masks


class Reconstructor:
    """Fits windows, each with a LightningModule and a Trainer of its own.

    Args:
        module: Makes the LightningModule from (window, masks, variance).
        trainer: Makes the Trainer from `callbacks` and `logger`.
        chain: The activations at the current boundary.
        logger: The run's log.
        batch_size: Samples per training batch.
        seed: Seed of the order of the samples; each window adds its index.
        callbacks: Callbacks of every Trainer, for example a progress display.
    """

    def __init__(
        self,
        module: Callable[..., LightningModule],
        trainer: Callable[..., Trainer],
        *,
        chain: Chain,
        logger: RunLogger,
        batch_size: int,
        seed: int,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.module = module
        self.trainer = trainer
        self.chain = chain
        self.logger = logger
        self.batch_size = batch_size
        self.seed = seed
        self.callbacks = list(callbacks)

    def fit(self, window: Window, masks: Mapping[str, Tensor]) -> WindowResult:
        """Train a pruned window towards the chain's targets; keep the result if it is better on held-out samples."""
        start = time.perf_counter()
        variance = self.chain.target_variance()
        before, held_out_before = after, held_out_after = self._errors(window, variance)
        pruned = [parameter.detach().clone() for parameter in window.parameters()]
        note, steps = DIVERGED, 0
        for factor in (1.0, 0.5):
            steps, diverged = self._train(window, masks, variance, factor)
            after, held_out_after = self._errors(window, variance)
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
        seconds = round(time.perf_counter() - start, 3)
        return WindowResult(window.name, before, after, held_out_before, held_out_after, accepted, steps, seconds, note)

    def _errors(self, window: Window, variance: float) -> tuple[float, float]:
        """Relative errors on as many calibration samples as there are held-out ones, and on those."""
        train, total = self.chain.num_samples, len(self.chain.tokens_ST)
        return (
            relative_error(window, self.chain, 0, min(train, total - train), variance=variance),
            relative_error(window, self.chain, train, total, variance=variance),
        )

    def _train(self, window: Window, masks: Mapping[str, Tensor], variance: float, factor: float) -> tuple[int, bool]:
        """Fit once; how many steps the optimizer made, and whether the loss diverged."""
        guard = FiniteLoss()
        self.logger.start_window(window.name)
        module = self.module(window, masks, variance)
        data = ActivationDataModule(self.chain, batch_size=self.batch_size, seed=self.seed + window.indices.start)
        trainer = self.trainer(
            logger=self.logger, callbacks=[LearningRate(factor), FirstHeldOut(), guard, *self.callbacks]
        )
        window.requires_grad_(True)
        try:
            with _interruptible():
                trainer.fit(module, datamodule=data)
        finally:
            window.requires_grad_(False)
            window.zero_grad(set_to_none=True)
        window.to(self.chain.compute.device)  # the Trainer's teardown moved it to the CPU
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
def _restore(window: Window, weights: Sequence[Tensor]) -> None:
    for parameter, weight in zip(window.parameters(), weights, strict=True):
        parameter.copy_(weight)


def _check_zeros(window: Window, masks: Mapping[str, Tensor]) -> None:
    """Raise if training moved a pruned weight: only an optimizer that mixes weights of one matrix can do that."""
    for matrix in window.matrices():
        if matrix.name in masks and torch.count_nonzero(matrix.weight[~masks[matrix.name]]):
            raise RuntimeError(
                f"{window.name}: the optimizer moved pruned weights of {matrix.name}. Use an elementwise optimizer "
                "(AdamW, SGD), or multiply the weights by their masks in your module's optimizer_step."
            )
