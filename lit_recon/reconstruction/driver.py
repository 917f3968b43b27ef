"""The walk: prune and reconstruct one window after the other.

    1. move the window's dense weights to the device, in float32
    2. one dense pass: its targets and the criterion's statistics together
    3. score, mask, prune in place; with a criterion that changes weights, to those that it leaves
    4. fit: a LightningModule over the window, a LightningDataModule over its activations, a fresh Trainer
    5. advance the chain: with dense inputs and targets, the targets are the next window's inputs
    6. move the window back; callbacks commit it: the point from which an interrupted run is resumed

Single matrices share steps 1, 2, 5 and 6 with the other matrices of their layer (activations/steps.py).

With dense inputs, targets and statistics no step of a window needs another window's result: windows could be
reconstructed in any order, or in parallel (`Propagation.independent`). Only the dense chain is handed on.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from lit_recon.activations.chain import Chain
from lit_recon.activations.steps import steps
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.windows import AnyWindow, Window
from lit_recon.pruning.pruner import Pruner, Pruning, prune
from lit_recon.pruning.statistics import InputStatistics
from lit_recon.reconstruction.window_fit import WindowFitter
from lit_recon.reconstruction.window_result import WindowResult, kept_pruned
from lit_recon.system.finite import NotFinite, first_not_finite
from lit_recon.system.signals import protected

NOTHING_PRUNED = "what pruning takes is zero already, so there is no error"
NOT_CHOSEN = "left out by windows.match or windows.skip"


class WalkCallback:
    """Hooks of a walk; each does nothing unless a subclass says otherwise."""

    def on_window_pruned(self, window: Window, pruned: Pruning) -> None:
        """A criterion that changes weights has decided on a window, which is still dense.

        Args:
            window: The window, on the device.
            pruned: What stays of the matrices of the layers that it keeps; weights in the model's own dtypes.
        """

    def on_window_fit(self, result: WindowResult) -> None:
        """One more window is fitted; it is committed when the chain has stepped over its layer."""

    def on_window_end(self, window: Window, masks: Mapping[str, Tensor], results: Sequence[WindowResult]) -> None:
        """The chain has stepped over a window.

        Args:
            window: The window, with the weights that it keeps in the model's own dtypes, on the CPU.
            masks: Masks (True = kept) of the matrices of the layers that it keeps, by name.
            results: The results of all windows so far.
        """


def walk(
    windows: Sequence[AnyWindow],
    *,
    chain: Chain,
    pruner: Pruner,
    fitter: WindowFitter,
    weights: WeightOffloader,
    callbacks: Sequence[WalkCallback] = (),
    done: Sequence[WindowResult] = (),
) -> list[WindowResult]:
    """Prune and reconstruct windows in order.

    Args:
        windows: The windows that are left.
        chain: The chain at the first of them.
        pruner: Makes their masks.
        fitter: Fits them.
        weights: Moves their weights.
        callbacks: Called after each fit, and after each window that the chain steps over, in this order.
        done: Results of the windows before them.

    Returns:
        One result per window, those of `done` first.

    Raises:
        NotFinite: Hidden states, statistics, scores, targets or errors are not finite; the message says where.
    """
    results = list(done)
    fitter.resume(results)
    with _quick_collection():
        for step, upcoming in steps(windows, chain, needs_gram=fitter.needs_gram, solves_first=fitter.solves_first):
            with _explaining(step.window, chain.passes.compute.precision):
                pruner.begin(step.window)
                weights.onload(step.window, prefetch=upcoming)  # 1
                statistics = pruner.statistics(step.window, step.observed_grams())
                chain.dense_pass(step.window, [statistics, *step.observers])  # 2
                masks, changed = _decided(pruner, step.window, statistics, weights, callbacks)  # 3
                del statistics  # may be as large as the weights
                for window, data in step.training_data():
                    start = fitter.start(window, masks, step.grams() if window.is_chosen else None)  # dense
                    was_dense = not (prune(window, masks, changed) or pruner.has_pruned)
                    for matrix in window.matrices():  # where they are now
                        changed.pop(matrix.name, None)
                    if was_dense and _matches_itself(step.window, chain, results):
                        results.append(kept_pruned(window, NOTHING_PRUNED))
                    elif not window.is_chosen:
                        results.append(kept_pruned(window, NOT_CHOSEN))
                    else:
                        results.append(fitter.fit(window, masks, data, weights.dtypes(window), start))  # 4
                    del data, start  # before the next matrix's data are made, or the chain advances
                    for callback in callbacks:
                        callback.on_window_fit(results[-1])
                step.install()
                chain.advance(step.window)  # 5
            with protected():
                weights.offload(step.window)  # 6
                kept = {one.name: masks[one.name] for one in step.window.kept_matrices() if one.name in masks}
                for callback in callbacks:
                    callback.on_window_end(step.window, kept, results)
    return results


def _decided(
    pruner: Pruner,
    window: Window,
    statistics: InputStatistics,
    weights: WeightOffloader,
    callbacks: Sequence[WalkCallback],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks of a window's matrices, and the weights that the criterion has changed, as they will be stored."""
    decided = pruner.decide(window, statistics)
    changed = weights.as_stored(window, decided.weights)
    kept = [matrix.name for matrix in window.kept_matrices()]
    if changed:
        for callback in callbacks:
            callback.on_window_pruned(window, Pruning(decided.masks, changed).of(kept))
    return decided.masks, changed


def _matches_itself(window: Window, chain: Chain, results: Sequence[WindowResult]) -> bool:
    """Whether a window that is dense outputs its targets: they are of its own inputs, or nothing has changed so far."""
    of_its_inputs = chain.propagation.one_source and not window.has_shared_norms
    return of_its_inputs or all(one.note.startswith(NOTHING_PRUNED) for one in results)


@contextmanager
def _explaining(window: Window, precision: str) -> Iterator[None]:
    """A context in which a number that is not finite ends the walk with the window's name and what to do."""
    try:
        yield
    except NotFinite as error:
        where = "" if window.name in str(error) else f"{window.name}: "
        damaged = [name for name, parameter in window.named_parameters() if first_not_finite(parameter)]
        if damaged:
            remedy = f"{damaged[0]} of the window is not finite itself: use another copy of the model"
        elif precision == "16-mixed":
            remedy = "trainer.precision=16-mixed ends at 65504: start again with bf16-mixed or 32-true"
        else:
            remedy = (
                f"in trainer.precision={precision} that is the model's weights, the text or the criterion: look at "
                "that window and sample, and start again without what is wrong"
            )
        raise NotFinite(f"{where}{error}; {remedy}.") from error


@contextmanager
def _quick_collection() -> Iterator[None]:
    """A context in which `gc.collect` takes milliseconds: it does not look at what existed before."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
