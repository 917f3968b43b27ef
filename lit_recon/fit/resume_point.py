"""The resume point of a walk: what a commit holds, and how a walk is taken up from it.

    layer_00003.00007   weights of a layer after window 7, in the model's own dtypes   (one per layer that is done)
    masks.00007         masks of window 7, bit-packed                                  (one per window)
    chain.00007         hidden states at the boundary behind window 7                  (the newest)
    unit.<name>         masks of a unit that is larger than the windows and in work

and, as JSON, the results so far, the step of the curves, seconds per phase and what the caller adds. Nothing random is
in it: what is drawn for a window follows from the seed and the window's index alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_recon.activations.chain import Chain
from lit_recon.model.offload import Checkpoint
from lit_recon.model.windows import Window
from lit_recon.pruning.masks import PackedMasks
from lit_recon.pruning.pruner import Pruner
from lit_recon.reconstruction.tensorboard import RunLogger
from lit_recon.reconstruction.window_fit import WindowResult
from lit_recon.system.clock import Clock
from lit_recon.system.commits import Commit, Commits


class Journal:
    """Commits a walk after each window, and takes it up again.

    Args:
        commits: Where commits go.
        chain: The chain at the current window.
        pruner: Makes the masks.
        checkpoint: The model between its windows.
        logger: The run's log.
        clock: Seconds per phase.
        facts: What is written with each commit and never changes: the run's signature, the dense model's perplexity.
        published: Called with the indices of the layers in a commit that is whole, and all results so far.

    Attributes:
        done: The results of all windows that are committed.
    """

    def __init__(
        self,
        commits: Commits,
        *,
        chain: Chain,
        pruner: Pruner,
        checkpoint: Checkpoint,
        logger: RunLogger,
        clock: Clock,
        facts: Mapping[str, Any],
        published: Callable[[Sequence[int], Sequence[WindowResult]], None],
    ) -> None:
        self.commits, self.chain, self.pruner, self.checkpoint = commits, chain, pruner, checkpoint
        self.logger, self.clock, self.facts, self.published = logger, clock, facts, published
        self.done: list[WindowResult] = []
        self._layers: dict[int, str] = {}
        self._masks: list[str] = []
        self._unit: str | None = None

    def commit(self, window: Window, results: Sequence[WindowResult]) -> None:
        """Write what has changed with a window, and make it the point from which a run goes on."""
        number = len(results)
        layers, masks = self.checkpoint.write(window, self.commits.write, number)
        self._layers |= layers
        self._masks.append(masks)
        chain = f"chain.{number:05}"
        self.commits.write(chain, self.chain.state())
        unit = self._write_unit()
        state = {
            **self.facts,
            "windows": [asdict(result) for result in results],
            "layers": {str(index): name for index, name in self._layers.items()},
            "masks": self._masks,
            "chain": chain,
            "unit": unit,
            "by_magnitude": self.pruner.labels,
            "step": self.logger.last_step,
            "seconds": self.clock.seconds,
            "elapsed": self.clock.total(),
        }
        files = [*self._layers.values(), *self._masks, chain, *([unit] if unit else [])]
        self.commits.commit(number, state, files)
        self.done = list(results)
        self.published(list(layers), results)

    def layer_files(self) -> dict[int, Path]:
        """The files of the layers that are done, by index."""
        return {index: self.commits.path(name) for index, name in self._layers.items()}

    def _write_unit(self) -> str | None:
        """The file with the masks of the unit in work, written when the unit is new."""
        pending = self.pruner.pending
        if pending is None:
            self._unit = None
        elif self._unit != f"unit.{pending[0]}":
            masks = PackedMasks()
            for name, mask in pending[1].items():
                masks.add(name, mask)
            self._unit = f"unit.{pending[0]}"
            self.commits.write(self._unit, masks.tensors(), masks.metadata())
        return self._unit

    def restore(self, commit: Commit) -> None:
        """Have everything as it was after a commit."""
        state = commit.state
        self._layers = {int(index): name for index, name in state["layers"].items()}
        self._masks, self._unit = list(state["masks"]), state["unit"]
        self.checkpoint.restore(self.layer_files(), map(self.commits.path, self._masks))
        self.chain.restore(commit.read(state["chain"]))
        pending = None
        if self._unit is not None:
            unit = PackedMasks.load(commit.path(self._unit))
            pending = self._unit.removeprefix("unit."), {name: unit[name] for name in unit}
        self.pruner.resume(pending, state["by_magnitude"])
        self.logger.last_step = state["step"]
        self.clock.resume(state["seconds"], state["elapsed"])
        self.done = [WindowResult(**result) for result in state["windows"]]
