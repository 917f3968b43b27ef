"""What a run shows while it walks: one bar over all windows with the time left, or a line per window in a log file."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging as transformers_logging

from lit_recon.reconstruction.window_fit import WindowResult
from lit_recon.system.units import duration

log = logging.getLogger(__name__)


class WalkProgress(Callback):
    """Progress over the windows of a walk; as a Lightning callback it also moves within a window.

    Args:
        console: Where to show it.
        num_windows: Windows of the walk.
        done: Results of those that an earlier run has done.
    """

    def __init__(self, console: Console, num_windows: int, *, done: Sequence[WindowResult] = ()) -> None:
        self.done: list[WindowResult] = list(done)
        self._before = len(done)
        self._num_windows = num_windows
        self._start = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[windows]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("reconstructing", total=num_windows, windows="", left="")
        self._progress.update(self._task, completed=len(done))

    def __enter__(self) -> "WalkProgress":
        """Start the display and the clock."""
        self._start = time.perf_counter()
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take the display down, also after an error."""
        self._progress.stop()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move within the window, never quite to its end: what is measured after the fit takes time too."""
        share = min(0.99, (trainer.fit_loop.total_batch_idx + 1) / max(1, self._total_batches(trainer)))
        self._progress.update(self._task, completed=len(self.done) + share)

    def window_done(self, result: WindowResult) -> None:
        """One more window; say what became of it."""
        self.done.append(result)
        number, left = len(self.done), self._left()
        windows = f"{number}/{self._num_windows}"
        self._progress.update(self._task, completed=number, windows=windows, left=left, description=result.name)
        if self._progress.disable:
            change = f"held-out error {result.held_out_before:.3g} -> {result.held_out_after:.3g}"
            log.info("%s %s: %s, %s%s", windows, result.name, change, left, f" ({result.note})" if result.note else "")

    def _left(self) -> str:
        """Time left, from the mean of this run's windows so far."""
        mean = (time.perf_counter() - self._start) / (len(self.done) - self._before)
        return f"{duration(mean * (self._num_windows - len(self.done)))} left"

    @staticmethod
    def _total_batches(trainer: Trainer) -> float:
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 1
        return epochs * trainer.num_training_batches


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without transformers' bars for work on local files: seconds long, and in the way of the run's own display."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
