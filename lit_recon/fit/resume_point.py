"""The resume point of a walk: what a commit holds, and how a walk is resumed from it.

    layer_00003.00007   weights of a layer after window 7, in the model's own dtypes   (one per layer that is done)
    masks.00007         masks of window 7, bit-packed                                  (one per window)
    chain.00007         hidden states at the boundary after window 7                   (the newest)
    unit.<name>         masks of the pruning window, larger than the windows, in which the walk is

and, as JSON, the results so far, the step of the curves, seconds per phase and what the caller adds. Nothing random is
in it: what is drawn for a window follows from the seed and the window's index alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_recon.fit.session import Session
from lit_recon.model.windows import Window
from lit_recon.pruning.masks import Masks
from lit_recon.reconstruction.driver import WalkCallback
from lit_recon.reconstruction.tensorboard import RunLogger
from lit_recon.reconstruction.window_fit import WindowResult
from lit_recon.system.commits import Commit, CommitError, Commits


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
    """

    def __init__(self, commits: Commits, session: Session, logger: RunLogger, facts: Mapping[str, Any]) -> None:
        self.commits, self.session, self.logger, self.facts = commits, session, logger, facts
        self.done: list[WindowResult] = []
        self.masks = Masks()
        self._layers: dict[int, str] = {}
        self._mask_files: list[str] = []
        self._unit: str | None = None

    def on_window_end(self, window: Window, masks: Mapping[str, Tensor], results: Sequence[WindowResult]) -> None:
        """Write what has changed with a window, and make it the point from which a run is resumed."""
        session, number = self.session, len(results)
        if changed := session.weights.files.changed() if session.weights.files else []:
            raise CommitError(
                f"{'; '.join(changed)} while the run had the dense model mapped from there: window {window.name} is "
                f"not kept. Restore the model and resume with resume={self.commits.folder.parent}"
            )
        with session.clock.phase("commit"):
            self._write_layers(window, number)
            self._write_masks(masks, number)
            chain = f"chain.{number:05}"
            self.commits.write(chain, session.chain.state())
            unit = self._write_unit()
            state = {
                **self.facts,
                "windows": [asdict(result) for result in results],
                "layers": {str(index): name for index, name in self._layers.items()},
                "masks": self._mask_files,
                "chain": chain,
                "unit": unit,
                "by_magnitude": session.pruner.by_magnitude,
                "step": self.logger.last_step,
                "seconds": session.clock.seconds,
                "elapsed": session.clock.total(),
            }
            files = [*self._layers.values(), *self._mask_files, chain, *([unit] if unit else [])]
            self.commits.commit(number, state, files)
            self.done = list(results)

    def restore(self, commit: Commit) -> None:
        """Return everything to what it was after a commit."""
        state, session = commit.state, self.session
        self._layers = {int(index): name for index, name in state["layers"].items()}
        self._mask_files, self._unit = list(state["masks"]), state["unit"]
        for index, path in self.layer_files().items():
            session.weights.restore_layer(index, path)
        for name in self._mask_files:
            self.masks.update(Masks.load(self.commits.path(name)))
        session.chain.restore(commit.read(state["chain"]))
        pending = None
        if self._unit is not None:
            pending = self._unit.removeprefix("unit."), Masks.load(commit.path(self._unit)).unpack()
        session.pruner.resume(pending, state["by_magnitude"])
        self.logger.last_step = state["step"]
        session.clock.resume(state["seconds"], state["elapsed"])
        self.done = [WindowResult(**result) for result in state["windows"]]

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
