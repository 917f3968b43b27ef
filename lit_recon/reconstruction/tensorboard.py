"""One TensorBoard log for a whole run, although each window has a Trainer of its own.

A Trainer counts its steps from zero, calls its metrics what the module calls them, and closes the logger when it is
done. This logger puts the window's name in front (`block_03/loss/train`), shifts the steps so that windows follow each
other on the x axis, and stays open. Of a model with many windows it keeps the curves of some, spread over the depth.
"""

import re
from argparse import Namespace
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_recon.report.run_files import finite_or_nan
from lit_recon.system.atomic_files import make_folder
from lit_recon.system.markdown import as_markdown, one_line
from lit_recon.system.signals import protected

MOST = 40  # windows whose curves are logged, where `every` is "auto": three names of curves each
LATER = 64  # times metrics of a GPU are kept before they are read
MEASURES = ("relative_error", "held_out", "typical")  # of results.json, before and after a window's fit
# TensorBoard's table of a sweep has the columns of its first run: all have the same, whatever their recipes say.
HPARAMS = (
    *("criterion", "pattern", "refine", "windows", "module", "inputs", "targets", "statistics", "walk", "epochs"),
    *("batch_size", "loss", "optimizer", "scheduler", "learning_rate", "keep", "patience", "start"),
)
NUMBERS = ("epochs", "learning_rate")  # of those, where a recipe has a number
_WHEN = ("before", "after")
_ABSENT = "-"
_OF_RESULTS = ".results"  # ends the name of the event file with what results.json says


@dataclass(frozen=True)
class LoggedWindows:
    """Which windows have curves in TensorBoard; errors over depth are those of all windows anyway.

    Attributes:
        every: Of every n-th window; "auto": of all, or of so many, spread evenly over the depth, that names stay few.
    """

    every: int | str = "auto"

    def __post_init__(self) -> None:
        """Find what is no number of windows."""
        if self.every != "auto" and (type(self.every) is not int or self.every < 1):
            raise ValueError(f"logger.every={self.every!r}: expected a number of windows, 1 for all, or auto.")

    def hidden(self, names: Sequence[str]) -> set[str]:
        """Which of some windows, in order, have no curves."""
        count, few = len(names), min(MOST, len(names))
        if isinstance(self.every, int):
            shown = {*range(0, count, self.every)}
        else:  # rounded: every fourth matrix would be of one kind
            shown = {round(index * (count - 1) / max(1, few - 1)) for index in range(few)}
        return {name for index, name in enumerate(names) if index not in shown}


class RunLogger(TensorBoardLogger):
    """TensorBoard logger of a run.

    Args:
        run: The run's folder; events go to `<run>/tensorboard`.
        last_step: The last step of a run that is resumed; what it logged after that is hidden.
        hidden: Names of windows whose curves are not logged.
        **settings: Of the SummaryWriter.

    Attributes:
        last_step: The last step of the windows so far; -1 before the first.
    """

    def __init__(
        self, run: Path, *, last_step: int | None = None, hidden: Collection[str] = (), **settings: Any
    ) -> None:
        purge: dict[str, Any] = {} if last_step is None else {"purge_step": last_step + 1}
        super().__init__(save_dir=run, name="tensorboard", version="", default_hp_metric=False, **purge, **settings)
        make_folder(Path(self.log_dir))
        # This process writes, whatever number the environment gives it among others.
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        self._window, self._offset, self._hidden = "", 0, hidden
        self.last_step = -1 if last_step is None else last_step
        self._later: list[tuple[Mapping[str, Tensor | float], int]] = []  # metrics that may not be computed yet

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
        self.write_later()
        self._window, self._offset = f"{name}/", self.last_step + 1

    def end_window(self) -> None:
        """From here on metrics have their own names and steps."""
        self.write_later()
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
        if self._window.removesuffix("/") in self._hidden:
            return
        named = {self._window + name: value for name, value in metrics.items() if name != "epoch"}
        try:
            with protected():  # an interruption within the queue of TensorBoard's thread would keep its lock for ever
                super().log_metrics(named, step)
        except ValueError as error:  # Lightning says of all that can go wrong that the value cannot be logged
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise

    def log_later(self, metrics: Mapping[str, Tensor | float], step: int) -> None:
        """Log `metrics` at `step` of the current window; those that a GPU computes are read some time later."""
        self._later.append((metrics, step))
        self.last_step = max(self.last_step, self._offset + step)
        if is_there(metrics) or len(self._later) >= LATER:
            self.write_later()

    def write_later(self) -> None:
        """Write what is to be logged later; a GPU is read once."""
        later, self._later = self._later, []
        tensors = [value.float() for metrics, _ in later for value in metrics.values() if isinstance(value, Tensor)]
        read = iter(torch.stack(tensors).tolist() if tensors else ())
        for metrics, step in later:
            known = {name: next(read) if isinstance(value, Tensor) else value for name, value in metrics.items()}
            self.log_metrics(known, step)

    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Only with metrics: every Trainer passes its module's hyperparameters, which would be an entry per window."""
        if metrics:
            super().log_hyperparams(vars(params) if isinstance(params, Namespace) else params, metrics)

    def log_plan(self, plan: Mapping[str, str], names: Sequence[str]) -> None:
        """Log the plan of a run in words, and charts of several curves each: one per kind of window, one over depth.

        Args:
            plan: Lines of text, by their names.
            names: Of all windows.
        """
        self._log_table("plan", plan)
        self.experiment.add_custom_scalars(layout(names))

    def log_results(self, results: Mapping[str, Any]) -> None:
        """Log what results.json says: errors over depth (x: index of the window), final numbers, a summary in words.

        To a file of its own, in place of that of a run that was killed before its results were saved.
        """
        for path in Path(self.log_dir).glob(f"*{_OF_RESULTS}"):
            path.unlink()
        log = RunLogger(Path(self.save_dir), filename_suffix=_OF_RESULTS)
        for index, window in enumerate(results["windows"]):
            names = [f"{part}_{when}" for part in MEASURES for when in _WHEN]
            log.log_metrics({f"depth/{name}": finite_or_nan(window[name]) for name in names}, index)
        finals = {f"perplexity/{state}": finite_or_nan(value) for state, value in results["perplexity"].items()}
        finals |= {name: finite_or_nan(results[name]) for name in ("gap_recovered", "gap_recovered_nats")}
        finals["seconds"] = finite_or_nan(results["seconds"]["total"])
        shown = {f"perplexity {state}": f"{finals[f'perplexity/{state}']:.3f}" for state in results["perplexity"]}
        log._log_table("summary", shown | results["model"] | results["recipe"])
        log._log_table("protocol", results["protocol"])
        log.log_hyperparams(hparams(results), finals)
        log.close()

    def _log_table(self, name: str, lines: Mapping[str, Any]) -> None:
        """Log a text: a table of names and values, of whatever letters."""
        rows = [f"| {as_markdown(key)} | {as_markdown(value)} |" for key, value in lines.items()]
        self.experiment.add_text(name, "\n".join(["| | |", "|---|---|", *rows]))

    def save(self) -> None:
        """Nothing: Lightning calls this after each logged step, and a flush to disk each time is slow."""

    def finalize(self, status: str) -> None:
        """Nothing: the next window continues in the same file. `close` ends the log."""

    def close(self) -> None:
        """Write what is left and close the event file."""
        self.experiment.flush()
        self.experiment.close()


def is_there(metrics: Mapping[str, Tensor | float]) -> bool:
    """Whether no GPU has to be waited for to read metrics."""
    return all(not isinstance(value, Tensor) or value.device.type == "cpu" for value in metrics.values())


def layout(names: Iterable[str]) -> dict[str, Any]:
    """TensorBoard's layout of charts: the loss of all windows of a kind in one chart, and errors over depth in one.

    Args:
        names: Of the windows; those that differ in numbers only are of one kind.
    """
    parts = (re.split(r"(?<![A-Za-z\d])\d+", name) for name in names)
    curves = {"N".join(fixed): r"\d+".join(map(re.escape, fixed)) for fixed in parts}
    return {
        "windows": {
            f"loss of {kind}": ["Multiline", [rf"^{curve}/loss/{part}$" for part in ("held_out", "train")]]
            for kind, curve in curves.items()
        },
        "depth": {
            "error over depth": ["Multiline", [f"^depth/{name}_{when}$" for name in MEASURES for when in _WHEN]],
        },
    }


def hparams(results: Mapping[str, Any]) -> dict[str, str | float]:
    """Hyperparameters of a run, the same ones for every run, from its results.json."""
    recipe = results["recipe"]
    chosen: dict[str, str | float] = {name: one_line(recipe.get(name, _ABSENT)) for name in HPARAMS}
    for name in NUMBERS:
        with suppress(ValueError):  # a rate that is found by a search
            chosen[name] = float(chosen[name])
    sparsity = finite_or_nan(results["sparsity"]["prunable"])
    return chosen | {"sparsity": sparsity, "tokens": sum(results["tokens"].values()), "seed": results["seed"]}
