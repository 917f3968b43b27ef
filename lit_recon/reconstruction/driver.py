"""The walk: prune and reconstruct one window after the other.

    1. bring the window's dense weights in
    2. one dense pass: its targets and the criterion's statistics together
    3. prune in place
    4. fit: a LightningModule over the window, a LightningDataModule over its activations, a fresh Trainer
    5. advance the chain: with dense inputs and targets, the targets are the next window's inputs
    6. take the window back and commit it: the point from which an interrupted run goes on

Single matrices share steps 1, 2, 5 and 6 with the other matrices of their layer.

With dense inputs, targets and statistics no step of a window needs another window's result: windows could be
reconstructed in any order, or in parallel (`Regime.independent`). The only thing that is handed on is the dense chain.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Protocol

from lightning import seed_everything
from torch import Tensor

from lit_recon.activations.chain import Chain, watching_nothing
from lit_recon.activations.datamodule import Activations
from lit_recon.activations.matrix_inputs import MatrixData
from lit_recon.model.offload import Checkpoint
from lit_recon.model.windows import AnyWindow, MatrixWindow, Window
from lit_recon.pruning.pruner import Pruner
from lit_recon.reconstruction.window_fit import Reconstructor, WindowResult, left_pruned, uses_moments
from lit_recon.system.clock import Clock
from lit_recon.system.memory import release_memory
from lit_recon.system.signals import protected


class Listener(Protocol):
    """Is told how the walk goes on, for example a progress display."""

    def window_done(self, result: WindowResult) -> None:
        """One more window is reconstructed; it is written out when its layer is done."""


def nothing_committed(window: Window, results: Sequence[WindowResult]) -> None:
    """A walk that leaves no resume points."""


def walk(
    windows: Sequence[AnyWindow],
    *,
    chain: Chain,
    pruner: Pruner,
    reconstructor: Reconstructor,
    checkpoint: Checkpoint,
    clock: Clock,
    listeners: Sequence[Listener] = (),
    done: Sequence[WindowResult] = (),
    commit: Callable[[Window, Sequence[WindowResult]], None] = nothing_committed,
) -> list[WindowResult]:
    """Prune and reconstruct `windows` in order.

    Args:
        windows: The windows that are left.
        chain: The chain at the first of them.
        pruner: Makes their masks.
        reconstructor: Fits them.
        checkpoint: The model between its windows.
        clock: Seconds per phase.
        listeners: Are told of each window.
        done: Results of the windows before them.
        commit: Called after each window that the chain steps over, with all results so far.

    Returns:
        One result per window, those of `done` first.
    """
    results = list(done)
    spans = [(span, list(group)) for span, group in groupby(windows, key=lambda window: window.span)]
    following = [*(span.indices for span, _ in spans[1:]), range(0)]
    with _quick_collection():
        for (span, group), next_indices in zip(spans, following, strict=False):
            seed_everything(reconstructor.seed + span.indices.start, verbose=False)  # what statistics or scores draw
            with clock.phase("teacher"):
                pruner.prepare(span)
            with clock.phase("advance"):
                checkpoint.bring_in(span)
                checkpoint.read_ahead(next_indices)
            masks: dict[str, Tensor] = {}
            single = [window for window in group if isinstance(window, MatrixWindow)]
            work = (chain, pruner, reconstructor, clock)
            for made, result in _matrices(span, single, *work) if single else _window(span, *work):
                masks |= made
                results.append(result)
                release_memory()
                for listener in listeners:
                    listener.window_done(result)
            with clock.phase("advance"):
                checkpoint.round(span)
                chain.advance(span)
            with clock.phase("commit"), protected():
                checkpoint.take_back(span, masks)
                commit(span, results)
    return results


Outcomes = Iterator[tuple[Mapping[str, Tensor], WindowResult]]


def _window(window: Window, chain: Chain, pruner: Pruner, reconstructor: Reconstructor, clock: Clock) -> Outcomes:
    """Steps 2 to 4 for a window of layers or a half: its masks and its result."""
    with clock.phase("teacher"):
        pruner.gather(window)
    with clock.phase("prune"):
        masks = pruner.prune(window.matrices())
    with clock.phase("fit"), chain.decoder.ends_on(chain.compute.device) if window.head else nullcontext():
        result = reconstructor.fit(window, masks, Activations.at(chain))
    yield masks, result


def _matrices(
    layer: Window,
    windows: Sequence[MatrixWindow],
    chain: Chain,
    pruner: Pruner,
    reconstructor: Reconstructor,
    clock: Clock,
) -> Outcomes:
    """Steps 2 to 4 for the matrices of a layer, which stays dense until the last of them is done."""
    data = MatrixData(layer, chain)
    moments = uses_moments(reconstructor.module)
    summed = moments and chain.regime.one_source
    shared = summed and chain.regime.independent  # one pass for targets, statistics and moments
    with clock.phase("teacher"):
        pruner.gather(layer, data.watching if shared else watching_nothing)
        if summed and not shared:
            chain.run(layer, chain.inputs_STD, None, data.watching)
    for window in windows:
        with clock.phase("teacher"):
            known = data.moments(window) if moments else data.activations(window)
        with clock.phase("prune"):
            window.open()
            masks = pruner.prune(window.matrices())
        with clock.phase("fit"):
            if known:
                result = reconstructor.fit(window, masks, known)
            else:
                result = left_pruned(window, "no calibration or no held-out token reaches it")
        del known  # before the next matrix's activations are made
        yield masks, result
    for window in windows:
        window.install()


@contextmanager
def _quick_collection() -> Iterator[None]:
    """Make `gc.collect` a matter of milliseconds: what exists now stays, and is not looked at."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
