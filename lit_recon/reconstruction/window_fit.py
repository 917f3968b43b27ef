"""The fit of one window: a LightningModule, a DataModule, a fresh Trainer; accepted, or the window keeps its weights.

A reconstruction is accepted if both the mean and the typical error on held-out samples became smaller (a mean alone may
be that of a few massive activations), of the weights as they will be stored: of a model in 16 bits they are rounded
before they are measured. At which learning rates a window is tried, each time from its pruned weights, says a
RateSearch (rate_search.py); the best try that is accepted is kept, else the pruned weights.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from lit_recon.activations.steps import TrainingData
from lit_recon.activations.window_grams import Grams
from lit_recon.model.errors import Errors
from lit_recon.model.windows import AnyWindow
from lit_recon.modules.trained import attached, changed_by, needs_gram, trained_by
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.reconstruction.fit_state import FitCommits
from lit_recon.reconstruction.fitted_weights import FittedWeights
from lit_recon.reconstruction.held_out_errors import HeldOutErrors, check_finite
from lit_recon.reconstruction.notes import note_on
from lit_recon.reconstruction.rate_search import RateSearch, RetryRates, Try, kind_of, share_left
from lit_recon.reconstruction.start import begin, solutions
from lit_recon.reconstruction.tensorboard import RunLogger
from lit_recon.reconstruction.trainer_callbacks import KeptState, LearningRate
from lit_recon.reconstruction.window_result import WindowResult, kept_pruned
from lit_recon.system.clock import Clock, timed
from lit_recon.system.finite import NotFinite
from lit_recon.system.memory import release_memory

log = logging.getLogger(__name__)


class WindowFitter:
    """Fits windows, each with a LightningModule and a Trainer of its own.

    Args:
        module: Makes the LightningModule from (window, masks, unit).
        trainer: Makes the Trainer from `callbacks` and `logger`.
        device: Where windows are trained.
        seed: Seed of the order of the samples; each window adds the index of its first layer.
        logger: The run's log; None for no curves.
        fitting: How windows are tried, and what is kept; FitSettings().
        search: Says at which learning rates a window is tried; None: at those of `fitting`.
        callbacks: Callbacks of every Trainer, for example a progress display.
        clock: Takes the seconds.
        scale: Share of the module's learning rate that all rates of the search are of.
        commits: Commits the fit of a window every so many steps; None: each window is short.
    """

    def __init__(
        self,
        module: Callable[..., LightningModule],
        trainer: Callable[..., Trainer],
        *,
        device: torch.device,
        seed: int,
        logger: RunLogger | None = None,
        fitting: FitSettings | None = None,
        search: RateSearch | None = None,
        callbacks: Sequence[Callback] = (),
        clock: Clock | None = None,
        scale: float = 1.0,
        commits: FitCommits | None = None,
    ) -> None:
        self.module, self.trainer = module, trainer
        self.device, self.seed, self.logger = device, seed, logger
        self.fitting = fitting or FitSettings()
        self.search = search or RetryRates(self.fitting.retry_rates)
        self.callbacks = list(callbacks)
        self.clock = clock or Clock()
        self.scale, self.commits = scale, commits

    @property
    def needs_gram(self) -> bool:
        """Whether single matrices are trained on normal equations."""
        return needs_gram(self.module)

    @property
    def solves_first(self) -> bool:
        """Whether matrices are solved for before windows are trained."""
        return self.fitting.start == "least_squares"

    @timed("fit")
    def start(self, window: AnyWindow, masks: Mapping[str, Tensor], grams: Grams | None) -> dict[str, Tensor]:
        """What a window's matrices are to start from instead of their pruned weights, by name; it is dense now."""
        return solutions(window, masks, grams) if grams else {}

    @timed("fit")
    def fit(
        self,
        window: AnyWindow,
        masks: Mapping[str, Tensor],
        data: TrainingData | None,
        dtypes: Sequence[torch.dtype] | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> WindowResult:
        """Train a pruned window towards its targets; keep the result if it is better on held-out samples.

        Args:
            window: The window, on the device.
            masks: Masks of its matrices (True = kept), and maybe of others.
            data: What it is trained on; None if no calibration or no held-out token reaches it.
            dtypes: Those in which the window's own parameters will be stored; None: those that they have.
            start: What `start` gave.

        Raises:
            NotFinite: Its targets, or its errors before training, are not finite.
        """
        if data is None:
            return kept_pruned(window, "no calibration or no held-out token reaches it")
        began = time.perf_counter()
        masks = {matrix.name: masks[matrix.name] for matrix in window.matrices() if matrix.name in masks}
        # What is drawn depends on the window alone, not on what was drawn before, so that a run can be resumed.
        seed_everything(self.seed + window.indices.start, verbose=False)
        try:
            unit = data.unit()
            if not math.isfinite(unit):
                raise NotFinite(f"{window.name}: the energy of its dense update is not finite ({unit})")
            if unit == 0:  # of a matrix of zeros
                return kept_pruned(window, "dense, it does nothing")
            with window.head.on(self.device) if window.head else nullcontext():
                result = self._reconstruct(window, masks, data, unit, dtypes, start or {})
        finally:
            release_memory()
        return replace(result, seconds=round(time.perf_counter() - began, 3))

    def _reconstruct(
        self,
        window: AnyWindow,
        masks: Mapping[str, Tensor],
        data: TrainingData,
        unit: float,
        dtypes: Sequence[torch.dtype] | None,
        start: Mapping[str, Tensor],
    ) -> WindowResult:
        """Train at one rate after the other, as the search says, and keep the best try that is accepted."""
        calibration = check_finite(window, "calibration", data.calibration_errors(window, unit))
        held_out = HeldOutErrors(window, data, unit)
        kind = kind_of(window.name, window.measure)
        module = self.module(window, masks, unit)
        weights = _fitted(module, window, dtypes, start)
        solved = begin(window, start, weights, data, unit, held_out.at_start()) if start else None
        origin = solved if solved and solved.accepted else None
        if self.commits and self.commits.resumed:
            held_out.at_start()  # its weights are put back, maybe to those of a try
        tries, best_weights = self.commits.begin(weights) if self.commits else ([], weights.start)
        best = min((one for one in tries if one.accepted), key=lambda one: one.left, default=None)
        while changed_by(module, window) and (rate := self.search.next(kind, tries)) is not None:
            if tries:
                if tries[-1] is best:
                    best_weights = weights.copies()
                weights.restore(weights.start)
                del module
                release_memory()  # optimizer and gradients of this try, before the next one makes its own
                if self.commits:  # they seed anew: what a try draws shall not depend on the steps of those before
                    seed_everything(self.seed + window.indices.start, verbose=False)
                module = self.module(window, masks, unit)
            if self.commits:
                self.commits.tries, self.commits.best_weights = tries, best_weights if best else []
            tries.append(self._try(module, held_out, weights, rate, origin=origin, best=best))
            if tries[-1].is_better_than(best):
                best = tries[-1]
        if tries and tries[-1] is not best:
            weights.restore(best_weights)
        if best:
            self.search.learn(kind, best.rate, best.left)
        _check_zeros(window, masks)
        if self.logger:
            self.logger.end_window()
        note = note_on(tries, best, weights.names_of_dtypes(), solved)
        before = calibration, held_out.at_start()
        return replace(_result(window, before, tries, best, origin), note=note, measure=window.measure, unit=unit)

    def resume(self, results: Sequence[WindowResult]) -> None:
        """Let the search learn from windows that were done before."""
        for one in results:
            if one.accepted and one.rate:
                before, after = (one.held_out_before, one.typical_before), (one.held_out_after, one.typical_after)
                if one.tries and not one.tries[0][0]:  # trained from what was solved for
                    before = (one.tries[0][1], one.tries[0][2])
                self.search.learn(kind_of(one.name, one.measure), one.rate, share_left(Errors(*before), Errors(*after)))

    def _try(
        self,
        module: LightningModule,
        held_out: HeldOutErrors,
        weights: FittedWeights,
        rate: float,
        *,
        origin: Try | None,
        best: Try | None,
    ) -> Try:
        """Train once, from the pruned weights or the better start that is the origin, and measure what will be stored.

        Calibration samples are looked at only where the try is better than the best one before it.
        """
        steps, kept = self._train(module, held_out, weights, rate)
        before = origin.held_out if origin else held_out.at_start()
        after, lost = _measured(held_out, weights, before.mean)
        tried = Try(
            rate=rate,
            before=before,
            held_out=after,
            calibration=None,
            diverged=kept.diverged or not all(map(math.isfinite, after)),
            steps=steps,
            lost=lost,
            remark="; ".join(filter(None, [getattr(module, "note", ""), kept.note])),
            kept_step=kept.kept_step,
            stopped_early=kept.stopped_early,
            halved=kept.halved,
        )
        if not tried.is_better_than(best):
            return tried
        calibration = held_out.data.calibration_errors(held_out.window, held_out.unit)
        return replace(tried, calibration=calibration, diverged=not all(map(math.isfinite, calibration)))

    def _train(
        self, module: LightningModule, held_out: HeldOutErrors, weights: FittedWeights, rate: float
    ) -> tuple[int, KeptState]:
        """Fit once; how many steps the optimizer made, and which state was kept."""
        window, data = held_out.window, held_out.data
        kept = KeptState(self.fitting, weights.by_id(), held_out.metrics)
        seed = self.seed + window.indices.start
        if self.logger:
            self.logger.start_window(window.name)
        commits = [self.commits.callback(seed, data, kept)] if self.commits else []
        trainer = self.trainer(
            logger=self.logger or False,
            callbacks=[held_out, LearningRate(rate * self.scale), kept, *self.callbacks, *commits],
            **data.trainer_settings,
            **({"num_sanity_val_steps": 0} if held_out.metrics else {}),
        )
        masters = [(parameter, parameter.data) for parameter in window.parameters()]
        try:
            with _interruptible(), held_out.observing(module), attached(module):
                for parameter in trained_by(module, window):
                    parameter.requires_grad_(True)
                trainer.fit(module, datamodule=data.data_module(seed))
        finally:
            window.requires_grad_(False)
            window.zero_grad(set_to_none=True)
            for callback in self.callbacks:  # Lightning gives them the module's `log`, by which they would keep it
                vars(callback).pop("log", None)
                vars(callback).pop("log_dict", None)
        for parameter, master in masters:  # a strategy of the user's own moved them to the CPU
            if parameter.data.device != master.device:
                parameter.data = master.copy_(parameter.data)
        window.to(self.device)  # buffers
        return trainer.global_step, kept


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn what Lightning makes of Ctrl-C and SIGTERM (SystemExit, and handlers of its own) back into what it was."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as error:
        cause = error.__context__  # Lightning exits while it handles the exception of our handler
        raise type(cause)(*cause.args) if isinstance(cause, KeyboardInterrupt) else KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # of C code, which Python cannot install
                    signal.signal(number, handler)


def _result(
    window: AnyWindow, before: tuple[Errors, Errors], tries: Sequence[Try], best: Try | None, origin: Try | None
) -> WindowResult:
    """The result of a window.

    Args:
        window: The window.
        before: Its errors, pruned, on calibration and on held-out samples.
        tries: The fits.
        best: That which is kept.
        origin: The better start that they began from.
    """
    kept = best or origin
    calibration, held_out = (kept.calibration, kept.held_out) if kept else before
    assert calibration is not None, "they were measured of what is kept"
    shown = kept or (tries[-1] if tries else None)
    return WindowResult(
        name=window.name,
        relative_error_before=before[0].mean,
        relative_error_after=calibration.mean,
        held_out_before=before[1].mean,
        held_out_after=held_out.mean,
        accepted=kept is not None,
        steps=0 if shown is None or shown.diverged else shown.steps,
        kept_step=best.kept_step if best else 0,
        stopped_early=shown is not None and shown.stopped_early,
        halved=shown is not None and shown.halved,
        seconds=0.0,
        lost_by_rounding=shown.lost if shown else 0.0,
        typical_before=before[1].typical,
        typical_after=held_out.typical,
        rate=shown.rate if shown else 0.0,
        tries=[[one.rate, one.held_out.mean, one.held_out.typical] for one in ([origin] if origin else []) + [*tries]],
    )


def _fitted(
    module: LightningModule, window: AnyWindow, dtypes: Sequence[torch.dtype] | None, start: Mapping[str, Tensor]
) -> FittedWeights:
    """What a module and a start change of a window.

    Args:
        module: The module.
        window: The window.
        dtypes: Those in which the window's own parameters will be stored; None: those that they have.
        start: What matrices start from, by name.
    """
    own = window.own_parameters()
    changes = {id(one) for one in changed_by(module, window)}
    changes |= {id(matrix.weight) for matrix in window.matrices() if matrix.name in start}
    changed = [one for one in own if id(one) in changes]
    stored = {id(one): dtype for one, dtype in zip(own, dtypes or [one.dtype for one in own], strict=True)}
    return FittedWeights(changed, [stored[id(one)] for one in changed])


def _measured(held_out: HeldOutErrors, weights: FittedWeights, before: float) -> tuple[Errors, float]:
    """Round a trained window to what will be stored of it, and measure that.

    Args:
        held_out: Measures it.
        weights: What was changed.
        before: Its mean held-out error before.

    Returns:
        Its held-out errors; the share of what it gained on these samples that rounding took back, up to 1.
    """
    exact = held_out.now().mean if weights.rounding_matters() else before
    weights.round()
    after = held_out.now()
    return after, min(1.0, max(0.0, (after.mean - exact) / (before - exact))) if exact < before else 0.0


def _check_zeros(window: AnyWindow, masks: Mapping[str, Tensor]) -> None:
    """Raise if training moved a pruned weight: only an optimizer that mixes weights of one matrix can do that."""
    for matrix in window.matrices():
        if matrix.name in masks and ((matrix.weight != 0) & ~masks[matrix.name]).any():
            raise RuntimeError(
                f"{window.name}: the optimizer moved pruned weights of {matrix.name}. Use an elementwise optimizer "
                "(AdamW, SGD), or multiply the weights by their masks in your module's optimizer_step."
            )
