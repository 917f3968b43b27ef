"""The resume point of a walk: what a commit holds, and how a walk is resumed from it.

    layer_00003.00007   weights of a layer after window 7, in the model's own dtypes   (one per layer that is done)
    masks.00007         masks of window 7, bit-packed                                  (one per window)
    pruned.00007        weights as a criterion that changes them has left them, before window 7 was trained
    chain.00007         hidden states at the boundary after window 7                   (the newest; none where windows
                        see the dense model's alone, which are made anew from its files)
    unit.<name>         masks of the pruning window, larger than the windows, in which the walk is
    fit.00031           weights and optimizer within the fit of all layers at once, which has no hidden states
    kept.1.00020        weights after step 20, the best of the try after 1 other       (keep=best; until others are)
    best.1              weights of the best try so far, after 1                        (where one was accepted)

and, as JSON, the results so far, the step of the curves, seconds and peak memory per phase, and what the caller adds.
Nothing random is in it: what is drawn for a window follows from the seed and the window's index alone.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_recon.fit.session import Session
from lit_recon.model.errors import Errors
from lit_recon.model.windows import Window, enclosing_windows
from lit_recon.pruning.masks import Masks, StoredWeights
from lit_recon.pruning.pruner import Pruning
from lit_recon.reconstruction.driver import WalkCallback
from lit_recon.reconstruction.fit_state import FitState
from lit_recon.reconstruction.rate_search import Try
from lit_recon.reconstruction.tensorboard import RunLogger
from lit_recon.reconstruction.window_result import WindowResult
from lit_recon.system.clock import WALK
from lit_recon.system.command_line import as_argument
from lit_recon.system.commits import Commit, CommitError, Commits
from lit_recon.system.units import duration

log = logging.getLogger(__name__)

ERRORS = ("before", "held_out", "calibration")  # of a Try


class ResumePoint(WalkCallback):
    """Commits a walk after each window, and resumes it.

    Args:
        commits: Where commits go.
        session: What walks.
        logger: The run's log.
        facts: What is written with each commit and never changes: the run's signature, the dense model's perplexity.

    Attributes:
        done: The results of all windows that are committed.
        masks: Their masks.
        pruned: The weights that the criterion has left, where it changes them.
        fit_state: Where the fit of all layers at once is, of a run that is resumed in it.
    """

    def __init__(self, commits: Commits, session: Session, logger: RunLogger, facts: Mapping[str, Any]) -> None:
        self.commits, self.session, self.logger, self.facts = commits, session, logger, facts
        self.done: list[WindowResult] = []
        self.masks = Masks()
        self._layers: dict[int, str] = {}
        self.pruned = StoredWeights()
        self._mask_files: list[str] = []
        self._pruned_files: list[str] = []
        self._unit: str | None = None
        self._fit_files: list[str] = []
        self._number = 0  # of the newest commit
        self.fit_state: FitState | None = None

    def describe_stop(self, folder: Path) -> str:
        """What is kept of a walk that did not come to its end, and how to resume it, by its folder."""
        done, session, again = self.done, self.session, as_argument("resume", folder)
        if not done:
            return f"no window was done yet; start again with {again}"
        total = session.num_fits
        if len(done) == len(session.windows):
            return (
                f"all {len(done)} windows are done, and all layers are not yet trained at once; {folder}/checkpoint "
                f"holds the windows as they are. Resume with: python -m lit_recon.fit {again}"
            )
        seconds = sum(session.clock.seconds[name] for name in WALK) / len(done) * (total - len(done))
        return (
            f"{len(done)} of {total} windows are done ({done[0].name} to {done[-1].name}); {folder}/checkpoint holds "
            f"them and is dense from there. Resume with: python -m lit_recon.fit {again}"
            f" (about {duration(seconds)} more)"
        )

    def on_window_pruned(self, window: Window, pruned: Pruning) -> None:
        """Write what a criterion that changes weights has left, which the commit of this window will list."""
        name = f"pruned.{self._number + 1:05}"
        with self.session.clock.phase("commit"):
            self.pruned.add(self.commits.write(name, pruned.weights))
        self._pruned_files.append(name)

    def on_window_end(self, window: Window, masks: Mapping[str, Tensor], results: Sequence[WindowResult]) -> None:
        """Write what has changed with a window, and make it the point from which a run is resumed."""
        session, number = self.session, max(len(results), self._number + 1)
        self._check_model(f"window {window.name}")
        with session.clock.phase("commit"):
            self._write_layers(window, number)
            self._write_masks(masks, number)
            chain = f"chain.{number:05}"
            states = {} if session.chain.propagation.independent else session.chain.state()
            if states:
                self.commits.write(chain, states)
            self._commit(number, results, chain=chain if states else None, unit=self._write_unit())

    def on_steps(self, fit: FitState) -> None:
        """Make the point that the fit of all layers at once has reached the one from which a run is resumed."""
        self._check_model(f"step {fit.step}")
        self.logger.write_later()
        number = self._number + 1
        state: dict[str, Any] = {"step": fit.step, "tries": [asdict(one) for one in fit.tries], "values": fit.values}
        self._write_fit(fit, number)
        state |= {"files": self._fit_files, "first_step": self.logger.first_step}
        self._commit(number, self.done, fit=state)

    def _check_model(self, what: str) -> None:
        """Raise a CommitError where the files have changed that the dense model is mapped from."""
        if changed := self.session.weights.files.changed() if self.session.weights.files else []:
            raise CommitError(
                f"{'; '.join(changed)} while the run had the dense model mapped from there: {what} is "
                f"not kept. Restore the model and resume with resume={self.commits.folder.parent}"
            )

    def _commit(
        self,
        number: int,
        results: Sequence[WindowResult],
        *,
        chain: str | None = None,
        unit: str | None = None,
        fit: Mapping[str, Any] | None = None,
    ) -> None:
        """Make a commit of what has been written, the current one."""
        session = self.session
        state = {
            **self.facts,
            "windows": [asdict(result) for result in results],
            "layers": {str(index): name for index, name in self._layers.items()},
            "masks": self._mask_files,
            "pruned": self._pruned_files,
            "chain": chain,
            "unit": unit,
            "fit": fit,
            "instead": session.pruner.instead,
            "step": self.logger.last_step,
            **session.clock.state(),
        }
        own = [name for name in (chain, unit, *(fit["files"] if fit else ())) if name]
        self.commits.commit(number, state, [*self._layers.values(), *self._mask_files, *self._pruned_files, *own])
        self._number, self.done = number, list(results)

    def restore(self, commit: Commit) -> None:
        """Return everything to what it was after a commit."""
        state, session = commit.state, self.session
        if state["chain"] is None and len(state["windows"]) < len(session.windows):
            self._make_dense_states(len(state["windows"]))  # while all layers are dense
        self._layers = {int(index): name for index, name in state["layers"].items()}
        self._mask_files, self._unit = list(state["masks"]), state["unit"]
        for index, path in self.layer_files().items():
            session.weights.restore_layer(index, path)
        for name in self._mask_files:
            self.masks.update(Masks.load(self.commits.path(name)))
        self._pruned_files = list(state["pruned"])
        for name in self._pruned_files:
            self.pruned.add(self.commits.path(name))
        self._number = commit.number
        if state["chain"] is None and len(state["windows"]) == len(session.windows):
            session.chain.forget()
        elif state["chain"] is not None:
            session.chain.restore(commit.read(state["chain"]))
        pending = None
        if self._unit is not None:
            pending = self._unit.removeprefix("unit."), Masks.load(commit.path(self._unit)).unpack()
        session.pruner.resume(pending, state["instead"])
        self.logger.last_step = state["step"]
        if fit := state["fit"]:
            self.logger.last_step = fit["first_step"] - 1  # its curves go on where they began
            tries = [Try(**one | {name: one[name] and Errors(*one[name]) for name in ERRORS}) for one in fit["tries"]]
            self._fit_files = list(fit["files"])
            tensors = {name: one for file in self._fit_files for name, one in commit.read(file).items()}
            self.fit_state = FitState(step=fit["step"], tries=tries, values=fit["values"], tensors=tensors)
        session.clock.resume(state)
        self.done = [WindowResult(**result) for result in state["windows"]]

    def _make_dense_states(self, done: int) -> None:
        """Let the dense chain step over the windows that are done, as it did before."""
        session = self.session
        passed = enclosing_windows(session.windows[:done])
        if passed:
            log.info("resuming: hidden states of the dense model are made anew, through %s", passed[-1].name)
        for window in passed:
            session.weights.onload(window)
            session.chain.dense_pass(window)
            session.chain.advance(window)
            session.weights.discard()
        session.weights.release_pages()

    def layer_files(self) -> dict[int, Path]:
        """The files of the layers that are done, by index."""
        return {index: self.commits.path(name) for index, name in self._layers.items()}

    def _write_layers(self, window: Window, number: int) -> None:
        """Write the layers that a window keeps; where the model is streamed, they are mapped from there afterwards."""
        names = {index: f"layer_{index:05}.{number:05}" for index in window.indices[: window.num_kept]}
        for index, name in names.items():
            path = self.commits.write(name, self.session.weights.layer_tensors(index), {"format": "pt"})
            self.session.weights.map_layer(index, path)
        self._layers |= names

    def _write_masks(self, masks: Mapping[str, Tensor], number: int) -> None:
        packed, name = Masks.pack(masks), f"masks.{number:05}"
        self.masks.update(Masks.load(self.commits.write(name, packed.tensors(), packed.metadata())))
        self._mask_files.append(name)

    def _write_fit(self, fit: FitState, number: int) -> None:
        """Write the tensors of a fit, of those that many steps have in common only what the last commit has not."""
        files: dict[str, dict[str, Tensor]] = {}
        for name, tensor in fit.tensors.items():
            part = name.partition(".")[0]
            file = f"{part}.{fit.lasting[part]}" if part in fit.lasting else f"fit.{number:05}"
            files.setdefault(file, {})[name] = tensor
        for file, tensors in files.items():
            if file not in self._fit_files:
                self.commits.write(file, tensors)
        self._fit_files = list(files)

    def _write_unit(self) -> str | None:
        """The file with the masks of the pruning window in which the walk is, written when that is new."""
        pending = self.session.pruner.pending
        if pending is None:
            self._unit = None
        elif self._unit != f"unit.{pending[0]}":
            masks = Masks.pack(pending[1])
            self._unit = f"unit.{pending[0]}"
            self.commits.write(self._unit, masks.tensors(), masks.metadata())
        return self._unit
