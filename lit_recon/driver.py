"""The walk: prune and reconstruct one window after the other.

    1. bring the window's dense weights in
    2. one dense pass: its targets and the criterion's statistics together
    3. prune in place
    4. fit: a LightningModule over the window, a LightningDataModule over its activations, a fresh Trainer
    5. advance the chain: the dense targets are the next window's inputs
    6. write the window out

With dense inputs and dense targets no step of a window needs another window's result: windows could be reconstructed in
any order, or in parallel. The only thing that is handed on is the dense chain.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from lit_recon.activations import Chain
from lit_recon.blocks import observed
from lit_recon.checkpoint import Checkpoint
from lit_recon.criteria import Criterion
from lit_recon.masks import Pattern
from lit_recon.metrics import Clock
from lit_recon.reconstruction import Reconstructor, Statistics, WindowResult, prune
from lit_recon.windows import Window


class Listener(Protocol):
    """Is told how the walk goes on, for example a progress display."""

    def window_done(self, result: WindowResult) -> None:
        """One more window is reconstructed and written out."""


def walk(
    windows: Sequence[Window],
    *,
    chain: Chain,
    criterion: Criterion,
    pattern: Pattern,
    reconstructor: Reconstructor,
    checkpoint: Checkpoint,
    clock: Clock,
    listeners: Sequence[Listener] = (),
) -> list[WindowResult]:
    """Prune and reconstruct `windows` in order; one result per window."""
    results = []
    with _quick_collection():
        for window in windows:
            with clock.phase("load"):
                checkpoint.bring_in(window)
            matrices = [matrix for matrix in window.matrices() if matrix.input_dim is not None]
            statistics = Statistics(criterion, matrices)
            with clock.phase("teacher"):
                chain.dense_pass(window, observed(statistics.watched, statistics.observe))
            with clock.phase("prune"):
                masks = prune(matrices, statistics, pattern)
            with clock.phase("fit"):
                result = reconstructor.fit(window, masks)
            with clock.phase("advance"):
                chain.advance()
            with clock.phase("commit"):
                checkpoint.write_out(window, masks)
            gc.collect()  # Trainer, module and optimizer refer to each other and would wait, with their tensors
            results.append(result)
            for listener in listeners:
                listener.window_done(result)
    return results


@contextmanager
def _quick_collection() -> Iterator[None]:
    """Make `gc.collect` a matter of milliseconds: what exists now stays, and is not looked at."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
