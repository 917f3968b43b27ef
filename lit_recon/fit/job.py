"""A run as objects: what is done (Method), how it is carried out (Execution), and where it goes (Output)."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from transformers import PreTrainedTokenizerBase

from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import StoreSettings, count_arrays
from lit_recon.data.source import Samples, TextSource
from lit_recon.model.loading import LanguageModel
from lit_recon.model.partition import Partition
from lit_recon.model.windows import AnyWindow, has_parallel_halves
from lit_recon.modules.trained import needs_gram
from lit_recon.pruning.allocation.rules import Rules
from lit_recon.pruning.criteria import Criterion, permutes
from lit_recon.pruning.criteria.given import GivenMasks
from lit_recon.pruning.patterns import Pattern, Unstructured
from lit_recon.pruning.refine import Refinement
from lit_recon.pruning.survey import Allocation
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.reconstruction.retraining import Retraining
from lit_recon.reconstruction.tensorboard import LoggedWindows
from lit_recon.system.device import Compute

USUAL = {"loss": "huber", "optimizer": "AdamW", "scheduler": "linear_with_warmup"}  # others are in a recipe
PRUNE_BY = ("window", "half", "block", "model")


@dataclass(frozen=True)
class Schedule:
    """How long each window is trained.

    Attributes:
        epochs: Passes over the calibration samples; below 1, `max_steps` alone counts.
        max_steps: Bound on optimizer steps; -1 for none.
        accumulate: Batches per optimizer step.
    """

    epochs: int
    max_steps: int
    accumulate: int

    @classmethod
    def from_trainer(cls, settings: dict[str, Any]) -> "Schedule":
        """The schedule of a Trainer's settings."""
        return cls(settings["max_epochs"], settings["max_steps"], settings["accumulate_grad_batches"])


@dataclass(frozen=True, kw_only=True)
class PruningMethod:
    """How a model is pruned.

    Attributes:
        criterion: Scores weights.
        pattern: Turns scores into masks.
        refinement: Refines masks; None where nothing does.
        rules: Give matrices patterns of their own, by name; None where there are none.
        allocation: Shares the sparsity out over layers, after a look at all of them; None where nothing does.
        prune_by: What is pruned at once, one of PRUNE_BY; "window" where it makes no difference.
        allow_unscored: Whether matrices may stay dense that the criterion cannot score.
    """

    criterion: Criterion
    pattern: Pattern
    prune_by: str
    allow_unscored: bool
    refinement: Refinement | None = None
    rules: Rules | None = None
    allocation: Allocation | None = None

    def describe_pattern(self) -> str:
        """What is removed where, in the words of the settings."""
        if isinstance(self.criterion, GivenMasks):
            return "as given"
        own = [] if self.rules is None else [self.rules.describe()]
        own += [] if self.allocation is None else [f"allocation {self.allocation.describe()}"]
        return ", ".join([*([] if self.is_covered else [self.pattern.describe()]), *own])

    @property
    def is_covered(self) -> bool:
        """Whether rules alone say what is removed: the setting `sparsity` is a list of them, and no number."""
        return self.rules is not None and isinstance(self.pattern, Unstructured) and not self.pattern.sparsity

    def describe(self) -> dict[str, str]:
        """The words of the settings, by what they are about."""
        reordered = ", channels reordered" if permutes(self.criterion) else ""
        found = {"criterion": type(self.criterion).__name__ + reordered, "pattern": self.describe_pattern()}
        return found if self.refinement is None else found | {"refine": type(self.refinement).__name__}


@dataclass(frozen=True, kw_only=True)
class TrainingMethod:
    """How windows are trained, and all layers at once.

    Attributes:
        module: Makes a window's LightningModule from (window, masks, unit).
        fitting: How windows are tried, and what is kept.
        trainer: Makes a window's Trainer from `callbacks` and `logger`.
        schedule: How long it trains.
        retraining: How all layers are trained at once.
        retraining_trainer: Makes the Trainer of that, which may have a strategy; None: `trainer`.
    """

    module: Callable[..., LightningModule]
    fitting: FitSettings
    trainer: Callable[..., Trainer]
    schedule: Schedule
    retraining: Retraining = Retraining()
    retraining_trainer: Callable[..., Trainer] | None = None

    @property
    def retraining_schedule(self) -> Schedule:
        """How long all layers are trained at once."""
        epochs = self.retraining.max_epochs
        return self.schedule if epochs is None else replace(self.schedule, epochs=epochs)

    @property
    def is_anchored(self) -> bool:
        """Whether the module pulls what it trains towards its start, of which it then holds copies."""
        return bool(_argument(self.module, "anchor"))

    def describe(self) -> dict[str, str]:
        """What differs from the defaults, and the learning rate, in the words of the settings."""
        found: dict[str, str] = {}
        for name, usual in USUAL.items():
            chosen = _argument(self.module, name)
            found |= {} if chosen is None or callable_name(chosen) == usual else {name: callable_name(chosen)}
        rate = getattr(_argument(self.module, "optimizer"), "keywords", {}).get("lr")
        found |= {"learning_rate": rate if isinstance(rate, str) else f"{rate:g}"} if rate is not None else {}
        if (train := _argument(self.module, "train")) is not None:
            found["train"] = str(train)
        return found if needs_gram(self.module) else found | self.fitting.describe()


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is done to a model.

    Attributes:
        pruning: How it is pruned.
        training: How windows are trained.
        windows: How the model is cut into windows.
        propagation: What windows see.
        walk: One of WALKS: windows are reconstructed one by one, or all layers are trained at once, or both in turn.
    """

    pruning: PruningMethod
    training: TrainingMethod
    windows: Partition
    propagation: Propagation
    walk: str = "local"

    def recipe(self, batch_size: int) -> dict[str, str]:
        """The method in the words of the settings, for results, report and model card."""
        schedule = self.training.schedule
        accumulated = f", {schedule.accumulate} per step" if schedule.accumulate > 1 else ""
        return {
            **self.pruning.describe(),
            "windows": self.windows.describe(),
            "module": callable_name(self.training.module),
            **self.propagation.describe(),
            "epochs": str(schedule.epochs),
            "batch_size": f"{batch_size}{accumulated}",
            **({} if self.walk == "local" else {"walk": self.walk, **self.training.retraining.describe()}),
            **self.training.describe(),
        }


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a method is carried out.

    Attributes:
        compute: Device and precision.
        store: Where hidden states are kept.
        batch_size: Samples per batch.
        memory_limit: Bytes; None for no limit.
        stop_after: Stop after so many windows, of which a fit of all layers at once is the last; None for all.
        seed: Of everything that is drawn.
        logged: Which windows have curves in TensorBoard.
    """

    compute: Compute
    store: StoreSettings
    batch_size: int
    memory_limit: int | None = None
    stop_after: int | None = None
    seed: int = 0
    logged: LoggedWindows = LoggedWindows()


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a run goes.

    Attributes:
        folder: The run's folder.
        config: The composed configuration.
        resume: Whether the run in `folder` is resumed.
        plan_only: Whether the plan is printed and nothing done.
        found: What the folder held when it was checked, `fit.output.folder.folder_state`.
        named_by_time: Whether the folder's name is made of the time, so that another will do as well.
    """

    folder: Path
    config: dict[str, Any]
    resume: bool
    plan_only: bool
    found: str
    named_by_time: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked run.

    Attributes:
        model: Where the dense model comes from.
        tokenizer: Its tokenizer.
        source: The text.
        samples: Its tokens: calibration, held-out and evaluation samples.
        method: What is done.
        execution: How it is carried out.
        output: Where it goes.
    """

    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    source: TextSource
    samples: Samples
    method: Method
    execution: Execution
    output: Output

    @property
    def recipe(self) -> dict[str, str]:
        """What is done, in the words of the settings."""
        return self.method.recipe(self.execution.batch_size)


def num_arrays(method: Method, store: StoreSettings, windows: Sequence[AnyWindow], kind: str | None = None) -> int:
    """How many arrays of hidden states a walk keeps at most.

    Args:
        method: What is done.
        store: Where they are kept.
        windows: The windows; none where the model has not been cut.
        kind: Their kind, where it is not the method's.
    """
    kind = kind or method.windows.by
    return count_arrays(
        method.propagation,
        store.targets,
        kind=kind,
        parallel=has_parallel_halves(windows),
        overlapping=kind == method.windows.by and method.windows.overlapping,
        prune_by=method.pruning.prune_by,
    )


def callable_name(make: Any) -> str:
    """Name of a class, also of one that is wrapped in partial calls."""
    while isinstance(make, partial):
        make = make.func
    return getattr(make, "__name__", type(make).__name__)


def _argument(make: Any, name: str) -> Any:
    """An argument of a partial call, or the default of what it calls."""
    if isinstance(make, partial) and name in make.keywords:
        return make.keywords[name]
    parameter = inspect.signature(make).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default
