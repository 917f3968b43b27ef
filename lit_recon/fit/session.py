"""A session: a loaded model that has passed all checks, and the objects that walk over it.

The command and the library open one in the same way, and `reconstruct` walks over it.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from transformers import PreTrainedModel

from lit_recon.activations.chain import Chain
from lit_recon.activations.passes import Passes
from lit_recon.activations.store import Room
from lit_recon.data.source import Samples
from lit_recon.fit.allocate import Allocated, allocate
from lit_recon.fit.checks import check_model, check_windows
from lit_recon.fit.job import Execution, Method, num_arrays
from lit_recon.fit.plan.device_room import samples_per_pass, training_room
from lit_recon.model.decoder import Decoder
from lit_recon.model.mapped_files import DenseFiles
from lit_recon.model.matrices import LayerMatrices
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import layer_windows
from lit_recon.model.verify import verify
from lit_recon.model.windows import AnyWindow, Window
from lit_recon.modules.rates import is_probed
from lit_recon.modules.untrained import Untrained
from lit_recon.pruning.criteria.given import GivenMasks
from lit_recon.pruning.masks import Masks
from lit_recon.pruning.pruner import Pruner
from lit_recon.reconstruction.driver import WalkCallback, walk
from lit_recon.reconstruction.fit_state import FitCommits
from lit_recon.reconstruction.rate_search import ProbedRates, RateSearch
from lit_recon.reconstruction.retraining import Retrained, open_retraining, retrain
from lit_recon.reconstruction.tensorboard import RunLogger
from lit_recon.reconstruction.window_fit import WindowFitter
from lit_recon.reconstruction.window_result import WindowResult
from lit_recon.system.clock import Clock
from lit_recon.system.device import waiting_for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A loaded model, cut into windows, and what walks over them.

    Attributes:
        model: The dense model; its layers become sparse during the walk.
        matrices: Its matrices by layer, used as a pass has shown.
        windows: Its windows, in order.
        chain: The chain at the first window.
        pruner: Makes the masks.
        weights: Moves the weights of one window at a time.
        clock: Takes the seconds.
        retrained: All layers, where they are trained at once after the walk.
        allocated: What looks at the dense model have decided.
    """

    model: PreTrainedModel
    matrices: LayerMatrices
    windows: list[AnyWindow]
    chain: Chain
    pruner: Pruner
    weights: WeightOffloader
    clock: Clock
    _: KW_ONLY
    allocated: Allocated = Allocated({}, ())
    retrained: Retrained | None = None

    @property
    def num_fits(self) -> int:
        """Windows, and the fit of all layers at once where there is one."""
        return len(self.windows) + (self.retrained is not None)


def open_session(
    model: PreTrainedModel,
    samples: Samples,
    method: Method,
    execution: Execution,
    *,
    activations: Path,
    files: DenseFiles | None = None,
    clock: Clock | None = None,
    allocated: Allocated | None = None,
) -> Session:
    """Cut a model into windows and check what only weights can tell.

    Args:
        model: The model on the CPU.
        samples: What it is calibrated on.
        method: What will be done.
        execution: How.
        activations: The folder of hidden states that are kept on disk.
        files: Where the model is streamed, the files that its weights are mapped from.
        clock: Takes the seconds.
        allocated: What was decided in a run that is resumed; None: it is decided here.

    Raises:
        ValueError: The layers do not do what was recorded, do not fall into the windows that were asked for, or hold
            matrices that cannot be scored; the disk has no room for hidden states.
    """
    clock = clock or Clock(wait=waiting_for(execution.compute.device))
    weights = WeightOffloader(model, execution.compute.device, files=files, clock=clock)
    lengths = _lengths(samples)
    matrices = verify(model, samples.calibration_ST, lengths=lengths)
    windows = method.windows.cut(model, matrices)
    pruning_windows = _pruning_windows(method, model, matrices)
    check_model(model, method, matrices)
    check_windows(windows, pruning_windows, method, recompute=execution.store.recompute)
    passes = _passes(model, samples, method, execution, windows, activations)
    chain = Chain(passes, method.propagation, recompute=execution.store.recompute, clock=clock)
    weights.release_pages()
    if isinstance(method.pruning.criterion, GivenMasks):
        method.pruning.criterion.prepare([matrix for layer in matrices for matrix in layer])
    if allocated is None:
        allocated = allocate(method, chain, matrices, windows, seed=execution.seed)
        weights.release_pages()
    if allocated.skipped:
        windows = method.windows.cut(model, matrices, skipped=allocated.skipped)
    pruner = Pruner(
        method.pruning.criterion,
        method.pruning.pattern,
        chain,
        patterns=allocated.patterns,
        refinement=method.pruning.refinement,
        pruning_windows=pruning_windows,
        seed=execution.seed,
        clock=clock,
    )
    retrained = None
    if method.walk != "local":
        settings, own_ST = method.training.retraining, samples.retraining_ST
        retrained = open_retraining(settings, passes, matrices, weights, samples_ST=own_ST)
    return Session(model, matrices, windows, chain, pruner, weights, clock, allocated=allocated, retrained=retrained)


def _passes(
    model: PreTrainedModel,
    samples: Samples,
    method: Method,
    execution: Execution,
    windows: Sequence[AnyWindow],
    activations: Path,
) -> Passes:
    """Passes over the samples, with a store that has room for their hidden states."""
    shape = samples.shape(model.config.get_text_config().hidden_size)
    length, device = samples.calibration_ST.shape[1], execution.compute.device
    reserved = training_room(windows, execution.batch_size * length)
    room = Room(device=device, limit=execution.memory_limit, reserved=reserved)
    arrays = (shape, num_arrays(method, execution.store, windows), room)
    execution.store.check(activations, *arrays)
    return Passes(
        Decoder(model, execution.compute.device),
        torch.cat([samples.calibration_ST, samples.held_out_ST]),
        num_samples=len(samples.calibration_ST),
        batch_size=execution.batch_size,
        compute=execution.compute,
        store=execution.store.open(activations, *arrays),
        pass_size=samples_per_pass(windows, execution.batch_size, length, device),
    )


def reconstruct(
    session: Session,
    method: Method,
    execution: Execution,
    masks: Masks,
    *,
    callbacks: Sequence[WalkCallback] = (),
    trainer_callbacks: Sequence[Callback] = (),
    logger: RunLogger | None = None,
    done: Sequence[WindowResult] = (),
    commits: FitCommits | None = None,
) -> list[WindowResult]:
    """Walk over the windows of a session that are not done, then train all layers at once, up to `stop_after`.

    Args:
        session: The session.
        method: What is done.
        execution: How.
        masks: Masks of the windows that are done, to which the callbacks add those of each window.
        callbacks: Of the walk.
        trainer_callbacks: Of every window's Trainer.
        logger: The run's log; None for no curves.
        done: The results of the windows that are done.
        commits: Of the fit of all layers at once; None: none within it.

    Returns:
        The results of all windows that are done.
    """
    settings: dict[str, Any] = {
        "device": execution.compute.device,
        "seed": execution.seed,
        "logger": logger,
        "fitting": method.training.fitting,
        "callbacks": trainer_callbacks,
        "clock": session.clock,
    }
    results = list(done)
    if len(done) < len(session.windows):
        results = walk(
            windows_left(session.windows, len(done), execution.stop_after),
            chain=session.chain,
            pruner=session.pruner,
            fitter=_window_fitter(session, method, settings),
            weights=session.weights,
            callbacks=callbacks,
            done=done,
        )
    stops = execution.stop_after is not None and execution.stop_after < session.num_fits
    if session.retrained is None or len(results) != len(session.windows) or stops:
        return results
    session.chain.forget()
    return retrain(
        session.retrained,
        masks,
        fitter=_global_fitter(session.retrained, method, settings, commits, results),
        weights=session.weights,
        callbacks=callbacks,
        done=results,
    )


def _window_fitter(session: Session, method: Method, settings: Mapping[str, Any]) -> WindowFitter:
    """Fits the windows of the walk; with walk=global it only measures them."""
    module: Any = Untrained if method.walk == "global" else method.training.module
    return WindowFitter(module, method.training.trainer, **settings, search=_search(method, session.windows))


def _global_fitter(
    retrained: Retrained,
    method: Method,
    settings: Mapping[str, Any],
    commits: FitCommits | None,
    results: Sequence[WindowResult],
) -> WindowFitter:
    """Fits all layers at once, by the loss, at the rate and with the Trainer of that, after windows with results."""
    before = [one.rate for one in results if one.accepted and one.rate]
    return WindowFitter(
        partial(method.training.module, loss=method.training.retraining.loss),
        method.training.retraining_trainer or method.training.trainer,
        **settings,
        search=_search(method, [retrained.window], before),
        scale=method.training.retraining.rate,
        commits=commits,
    )


def _search(method: Method, windows: Iterable[AnyWindow], before: Sequence[float] = ()) -> RateSearch | None:
    """Says at which rates some windows are tried; None: as their settings do."""
    probes = is_probed(method.training.module) and method.training.fitting.retry_rates
    return ProbedRates((window.name for window in windows), before=before) if probes else None


def windows_left(windows: Sequence[AnyWindow], done: int, stop_after: int | None) -> Sequence[AnyWindow]:
    """The windows to walk over: those after the first `done`, up to `stop_after`, but a layer's matrices together."""
    end = len(windows)
    if stop_after is not None and stop_after < end:
        last = windows[stop_after - 1].enclosing
        end = next((i for i in range(stop_after, end) if windows[i].enclosing is not last), end)
    return windows[done : max(done, end)]


def _lengths(samples: Samples) -> Mapping[str, int]:
    """Tokens of the samples that a model will be given, by the name of the setting."""
    lengths = {"data.length": samples.calibration_ST.shape[1]}
    return lengths | {"data.evaluation_length": samples.evaluation_ST.shape[1]}


def _pruning_windows(method: Method, model: PreTrainedModel, matrices: LayerMatrices) -> list[Window]:
    """What is pruned at once, where that is not each window."""
    try:
        return [] if method.pruning.prune_by == "window" else layer_windows(model, matrices, by=method.pruning.prune_by)
    except ValueError as error:  # it advises another kind of windows
        raise ValueError(f"prune_by=half: {str(error).partition(';')[0]}; use prune_by=block.") from error
