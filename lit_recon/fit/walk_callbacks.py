"""Callbacks of the walk: its progress bar, and the checkpoint that grows with it (its commits: resume_point.py)."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from lit_recon.fit.output.checkpoint import Companions, ShardedFolder, save_whole
from lit_recon.fit.resume_point import ResumePoint
from lit_recon.model.windows import Window
from lit_recon.reconstruction.driver import WalkCallback
from lit_recon.reconstruction.window_result import WindowResult
from lit_recon.system.atomic_files import sync_folder
from lit_recon.system.console import Console
from lit_recon.system.units import duration

log = logging.getLogger(__name__)


class ProgressBar(WalkCallback, Callback):
    """One bar over all windows with the time left, or a line per window in a log file.

    As a Lightning callback of each Trainer it also moves within a window.

    Args:
        console: Where to show it.
        num_windows: Windows of the walk.
        done: Results of those that an earlier run has done.
        together: Whether several windows are committed together: they count as done when they are.
        shown: Whether anything is shown.
    """

    def __init__(
        self,
        console: Console,
        num_windows: int,
        *,
        done: Sequence[WindowResult] = (),
        together: bool = False,
        shown: bool = True,
    ) -> None:
        self.done: list[WindowResult] = list(done)
        self._together = together
        self._before = len(done)
        self._num_windows, self._shown, self._console = num_windows, shown, console
        self._start = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[windows]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not shown or not (console.is_terminal or _has_widgets(console)),
        )
        self._task = self._progress.add_task("reconstructing", total=num_windows, windows="", left="")
        self._progress.update(self._task, completed=len(done))

    def __enter__(self) -> "ProgressBar":
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

    def on_window_fit(self, result: WindowResult) -> None:
        """One more window: its errors, and the time left."""
        self.done.append(result)
        number, left = len(self.done), self._left()
        windows = f"{number}/{self._num_windows}"
        self._progress.update(self._task, completed=number, windows=windows, left=left, description=result.name)
        change = f"held-out error {result.held_out_before:.3g} -> {result.held_out_after:.3g}, "
        change = change if result.measured else ""
        number_of = "" if self._together else f"{windows} "
        self._say(f"{number_of}{result.name}: {change}{left}{f' ({result.note})' if result.note else ''}")

    def on_window_end(self, window: Window, masks: Mapping[str, Tensor], results: Sequence[WindowResult]) -> None:
        """What was fitted together is done."""
        if self._together:
            self._say(f"{len(results)}/{self._num_windows} windows are done: those of {window.name}")

    def _say(self, line: str) -> None:
        """A line, where there is no bar that moves."""
        if self._shown and self._progress.disable:
            if self._console.is_jupyter:
                self._console.print(line, highlight=False, markup=False)
            else:
                log.info("%s", line)

    def _left(self) -> str:
        """Time left, from the mean of this run's windows so far."""
        mean = (time.perf_counter() - self._start) / (len(self.done) - self._before)
        return f"{duration(mean * (self._num_windows - len(self.done)))} left"

    @staticmethod
    def _total_batches(trainer: Trainer) -> float:
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 1
        return epochs * trainer.num_training_batches


def _has_widgets(console: Console) -> bool:
    """Whether a notebook can show a bar that moves."""
    return console.is_jupyter and find_spec("ipywidgets") is not None


class CheckpointWriter(WalkCallback):
    """Writes checkpoint/: after each window where the model is streamed, else when the walk ends.

    Args:
        folder: The run's folder.
        companions: What else is in it, such as the tokenizer.
        resume_point: Commits the windows, before this is called; the layers' files are its files.
        card: Makes the model card from the results so far.
    """

    def __init__(
        self,
        folder: Path,
        companions: Companions,
        resume_point: ResumePoint,
        card: Callable[[Sequence[WindowResult]], str],
    ) -> None:
        self.folder, self.companions, self.resume_point, self.card = folder, companions, resume_point, card
        self.session = resume_point.session
        files = self.session.weights.files
        self._shards = ShardedFolder(folder / "checkpoint", self.session.model, files) if files else None

    def open(self) -> None:
        """Bring a growing checkpoint to what is committed, and to dense weights elsewhere."""
        if self._shards is None:
            return
        done, files = self.resume_point.done, self.resume_point.layer_files()
        if done and self._shards.is_there():
            self._shards.mend(self.companions, files)
        else:
            self._shards.start(self.companions, self.card(done))
        for index, path in files.items():
            self._shards.put(index, path)
        self._shards.describe(self.card(done))

    def on_window_end(self, window: Window, masks: Mapping[str, Tensor], results: Sequence[WindowResult]) -> None:
        """Put the layers of a commit that is whole into a growing checkpoint."""
        if self._shards is not None:
            with self.session.clock.phase("commit"):
                files = self.resume_point.layer_files()
                for index in window.indices[: window.num_kept]:
                    self._shards.put(index, files[index])
                self._shards.describe(self.card(results))

    def close(self) -> None:
        """Write what belongs to the checkpoint as far as the walk came."""
        done = self.resume_point.done
        if not done:
            return
        with self.session.clock.phase("commit"):
            self.resume_point.masks.save(self.folder / "masks.safetensors")
            if self._shards is None:
                save_whole(self.folder / "checkpoint", self.session.model, self.companions, self.card(done))
            else:
                sync_folder(self.folder / "checkpoint")  # the names of its shards, before results say it is done
