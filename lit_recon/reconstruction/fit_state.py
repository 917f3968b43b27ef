"""State of a long fit, committed every so many steps of its optimizer, and the fit resumed from it.

A resumed fit goes once more through the batches that were done, without computing anything, so that schedule, order of
the samples and points of validation are what they were; then weights and optimizer take their state. Lightning's own
checkpoints would be pickles.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from lit_recon.reconstruction.fitted_weights import FittedWeights
from lit_recon.reconstruction.rate_search import Try
from lit_recon.reconstruction.trainer_callbacks import KeptState


@dataclass(kw_only=True)
class FitState:
    """Where a fit is.

    Attributes:
        step: Steps of the optimizer in the current try.
        tries: Those before it.
        values: What else JSON can hold of its state.
        tensors: The tensors of its state by name: those of the best try as best.<index>, of what this try returns to
            kept.<...>, and others.
        lasting: By the first part of the names of tensors that many steps have in common, what tells these from those
            of other steps.
    """

    step: int
    tries: Sequence[Try]
    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lasting: dict[str, str] = field(default_factory=dict)

    @property
    def best_weights(self) -> list[Tensor]:
        """Weights of the best try."""
        count = sum(name.startswith("best.") for name in self.tensors)
        return [self.tensors[f"best.{index}"] for index in range(count)]


class FitCommits:
    """Commits of a fit.

    Args:
        every: Steps from commit to commit.
        save: Commits a state.
        state: The state from which the fit is resumed; None: it starts.
    """

    def __init__(self, every: int, save: Callable[[FitState], None], state: FitState | None = None) -> None:
        self.every, self.save = every, save
        self.resumed = state
        self.tries: Sequence[Try] = []
        self.best_weights: Sequence[Tensor] = []

    def begin(self, weights: FittedWeights) -> tuple[list[Try], Sequence[Tensor]]:
        """The tries before the one in which the fit is resumed, and the best weights so far; none where it starts."""
        if self.resumed is None:
            return [], weights.start
        best_weights = self.resumed.best_weights or weights.start
        weights.restore(best_weights)
        return list(self.resumed.tries), best_weights

    def callback(self, seed: int, data: Any, kept: KeptState) -> "StepCommits":
        """The callback of the next try; that of the first one returns to the state from which the fit is resumed.

        Args:
            seed: From which, with the step, is drawn what is random after a commit.
            data: What is trained on; its `idle` says whether batches are only counted.
            kept: What the try returns to.
        """
        state, self.resumed = self.resumed, None
        return StepCommits(self, seed, data, kept, state)


class StepCommits(Callback):
    """Commits a try every so many steps, and resumes it."""

    def __init__(self, commits: FitCommits, seed: int, data: Any, kept: KeptState, state: FitState | None) -> None:
        self.commits, self.seed, self.data, self.kept, self.state = commits, seed, data, kept, state
        self._last = 0  # the last step that was committed
        self._validated: int | float = 1.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go through what was done: nothing is trained or validated until then."""
        if self.state is not None:
            self.data.idle = True
            self._validated, trainer.limit_val_batches = trainer.limit_val_batches, 0
            pl_module.training_step = lambda *_: None  # type: ignore[method-assign, assignment, return-value]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the next batch be a whole one where the state has been reached."""
        if self.state is not None and trainer.global_step == self.state.step:
            self.data.idle = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Commit, once all that belongs to the step before is done; or take the state up that was reached."""
        step = trainer.global_step
        if self.state is not None and step == self.state.step:
            del pl_module.training_step
            trainer.limit_val_batches = self._validated
            _restore(self.state, trainer, pl_module)
            self.state = None
        elif self.state is not None or step == self._last or step % self.commits.every:
            return
        elif not pl_module.automatic_optimization:  # whose steps cannot be gone through
            return
        else:
            self.commits.save(self._captured(trainer, pl_module))
        self._last = step
        seed_everything(self.seed + step, verbose=False)  # what is drawn from here on depends on the step alone

    def _captured(self, trainer: Trainer, module: LightningModule) -> FitState:
        """The state of the fit."""
        tries = self.commits.tries
        tensors = {f"weight.{index}": parameter.detach() for index, parameter in enumerate(_trained(module))}
        values = {name: _without_tensors(part.state_dict(), name, tensors) for name, part in _parts(trainer).items()}
        tensors |= {f"best.{index}": one for index, one in enumerate(self.commits.best_weights)}
        lasting = {"best": f"{len(tries)}", "kept": f"{len(tries)}.{self.kept.kept_step:05}"}
        return FitState(step=trainer.global_step, tries=tries, values=values, tensors=tensors, lasting=lasting)


def _parts(trainer: Trainer) -> dict[str, Any]:
    """What has a state besides the weights."""
    parts: dict[str, Any] = {f"optimizer.{index}": one for index, one in enumerate(trainer.optimizers)}
    parts |= {f"scheduler.{index}": one.scheduler for index, one in enumerate(trainer.lr_scheduler_configs)}
    for index, one in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
        if not isinstance(one, StepCommits):
            parts["kept" if isinstance(one, KeptState) else f"callback.{index}"] = one
    return parts | {"precision": trainer.precision_plugin}


def _trained(module: LightningModule) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@torch.no_grad()
def _restore(state: FitState, trainer: Trainer, module: LightningModule) -> None:
    """Return a fit to a state."""
    for index, parameter in enumerate(_trained(module)):
        parameter.copy_(state.tensors[f"weight.{index}"])
    for name, part in _parts(trainer).items():
        part.load_state_dict(_with_tensors(state.values[name], state.tensors))


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A state as JSON can hold it, its tensors put aside by name.

    Raises:
        ValueError: It holds what is neither.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[key, _without_tensors(one, f"{name}.{key}", tensors)] for key, one in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(one, f"{name}.{index}", tensors) for index, one in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"retraining: the state of {name} is a {type(value).__name__}, which a commit cannot hold; expected numbers, "
        "texts, tensors, and lists and mappings of these."
    )


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_without_tensors` was given; tuples are lists, tensors are copies that may be changed."""
    if isinstance(value, list):
        return [_with_tensors(one, tensors) for one in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]].clone()
        return {key: _with_tensors(one, tensors) for key, one in value["items"]}
    return value
