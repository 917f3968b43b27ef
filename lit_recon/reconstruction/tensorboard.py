"""One TensorBoard log for a whole run, although each window has a Trainer of its own.

A Trainer counts its steps from zero, calls its metrics what the module calls them, and closes the logger when it is
done. This logger puts the window's name in front (`block_03/loss/train`), shifts the steps so that windows follow each
other on the x axis, and stays open.
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_recon.report.run_files import finite_or_nan
from lit_recon.system.atomic_files import make_folder
from lit_recon.system.signals import protected

_OF_RESULTS = ".results"  # ends the name of the event file with what results.json says


class RunLogger(TensorBoardLogger):
    """TensorBoard logger of a run.

    Args:
        run: The run's folder; events go to `<run>/tensorboard`.
        last_step: The last step of a run that is resumed; what it logged after that is hidden.
        **settings: Of the SummaryWriter.

    Attributes:
        last_step: The last step of the windows so far; -1 before the first.
    """

    def __init__(self, run: Path, *, last_step: int | None = None, **settings: Any) -> None:
        purge: dict[str, Any] = {} if last_step is None else {"purge_step": last_step + 1}
        super().__init__(save_dir=run, name="tensorboard", version="", default_hp_metric=False, **purge, **settings)
        make_folder(Path(self.log_dir))
        # This process writes, whatever number the environment gives it among others.
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        self._window = ""
        self._offset = 0
        self.last_step = -1 if last_step is None else last_step

    @property
    def first_step(self) -> int:
        """The first step of the current window."""
        return self._offset

    @property
    def log_dir(self) -> str:
        """The folder of the event files; without a version of its own."""
        return self.root_dir

    def start_window(self, name: str) -> None:
        """From here on metrics belong to window `name`, whose step 0 is the one after the last step so far."""
        self._window, self._offset = f"{name}/", self.last_step + 1

    def end_window(self) -> None:
        """From here on metrics have their own names and steps."""
        self._window, self._offset = "", 0
        with protected():
            self.experiment.flush()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log `metrics` at `step` of the current window; the epoch is left out, it restarts in every window.

        Raises:
            OSError: The disk is full, for example.
        """
        step = self._offset + (step or 0)
        self.last_step = max(self.last_step, step) if self._window else self.last_step
        named = {self._window + name: value for name, value in metrics.items() if name != "epoch"}
        try:
            with protected():  # an interruption within the queue of TensorBoard's thread would keep its lock for ever
                super().log_metrics(named, step)
        except ValueError as error:  # Lightning says of all that can go wrong that the value cannot be logged
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise

    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Only with metrics: every Trainer passes its module's hyperparameters, which would be an entry per window."""
        if metrics:
            super().log_hyperparams(vars(params) if isinstance(params, Namespace) else params, metrics)

    def log_results(self, results: Mapping[str, Any]) -> None:
        """Log what results.json says: errors over depth (x: index of the window), final numbers, a summary in words.

        To a file of its own, in place of that of a run that was killed before its results were saved.
        """
        for path in Path(self.log_dir).glob(f"*{_OF_RESULTS}"):
            path.unlink()
        log = RunLogger(Path(self.save_dir), filename_suffix=_OF_RESULTS)
        for index, window in enumerate(results["windows"]):
            names = [
                f"{part}_{when}" for part in ("relative_error", "held_out", "typical") for when in ("before", "after")
            ]
            log.log_metrics({f"depth/{name}": finite_or_nan(window[name]) for name in names}, index)
        finals = {f"perplexity/{state}": finite_or_nan(value) for state, value in results["perplexity"].items()}
        finals["gap_recovered"] = finite_or_nan(results["gap_recovered"])
        rows = [f"| perplexity {state} | {finals[f'perplexity/{state}']:.3f} |" for state in results["perplexity"]]
        rows += [f"| {key} | {value} |" for key, value in (results["model"] | results["recipe"]).items()]
        text = "\n".join(["| | |", "|---|---|", *rows])
        log.experiment.add_text("summary", text.encode(errors="backslashreplace").decode())  # names of any encoding
        log.log_hyperparams(results["recipe"] | {"seed": results["seed"]}, finals)
        log.close()

    def save(self) -> None:
        """Nothing: Lightning calls this after each logged step, and a flush to disk each time is slow."""

    def finalize(self, status: str) -> None:
        """Nothing: the next window continues in the same file. `close` ends the log."""

    def close(self) -> None:
        """Write what is left and close the event file."""
        self.experiment.flush()
        self.experiment.close()
