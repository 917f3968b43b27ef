"""Progress of an evaluation and the time left: a bar on a terminal, some lines in a log file."""

import logging
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lit_recon.system.console import Console
from lit_recon.system.units import duration

log = logging.getLogger(__name__)

LINES = 10  # of a whole part of an evaluation, where there is no bar


class EvaluationProgress:
    """A bar over all pieces of work, or a line for each tenth of them.

    Args:
        console: Where to show it.
        total: Pieces of work that are known at the start.
    """

    def __init__(self, console: Console, total: int = 0) -> None:
        self.total, self.done = total, 0
        self._start = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("evaluating", total=total, left="")

    def __enter__(self) -> "EvaluationProgress":
        """Start the display and the clock."""
        self._start = time.perf_counter()
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take the display down, also after an error."""
        self._progress.stop()

    def expect(self, pieces: int) -> None:
        """There are more pieces of work than were known; the time left is counted from the first ones on."""
        if not self.total:  # what came before, such as moving a model, is no measure of them
            self._start = time.perf_counter()
        self.total += pieces
        self._progress.update(self._task, total=self.total)

    def tick(self, what: str, pieces: int = 1) -> None:
        """Some more pieces are done: what they were, and the time left."""
        before, self.done = self.done, self.done + pieces
        seconds = (time.perf_counter() - self._start) / self.done * max(0, self.total - self.done)
        left = f"{duration(seconds)} left"
        self._progress.update(self._task, completed=self.done, description=what, left=left)
        is_tenth = self.done * LINES // self.total > before * LINES // self.total
        if self._progress.disable and is_tenth:
            log.info("%d%% %s, %s", 100 * self.done // self.total, what, left)
