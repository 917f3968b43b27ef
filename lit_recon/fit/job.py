"""A run, once its parts are objects: what it is made of, and the model with all checks that need its weights."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_recon.activations.chain import Chain
from lit_recon.activations.disk_store import DiskStore
from lit_recon.activations.matrix_inputs import check_regime
from lit_recon.activations.propagation import Regime
from lit_recon.activations.store import Needed, Store, StoreSettings, count_arrays
from lit_recon.activations.teacher import check_halves
from lit_recon.data.source import Samples, TextSource
from lit_recon.fit.plan.estimate import Workload
from lit_recon.model.decoder import Decoder
from lit_recon.model.loading import LanguageModel
from lit_recon.model.mapped_files import DenseFiles
from lit_recon.model.offload import Checkpoint
from lit_recon.model.partition import Partition, layer_windows
from lit_recon.model.verify import examine
from lit_recon.model.windows import AnyWindow, MatrixWindow, Window, side_by_side
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.patterns import Pattern
from lit_recon.pruning.pruner import check_units
from lit_recon.system.command_line import check_pattern, check_scored
from lit_recon.system.device import Compute

log = logging.getLogger(__name__)

ACTIVATIONS = "activations"  # in the output folder, while a run that keeps them on disk is in work


@dataclass(frozen=True)
class Job:
    """A checked run: what `run` needs, as objects.

    Attributes:
        model: Where the dense model comes from.
        tokenizer: Its tokenizer.
        source: The text.
        samples: Its tokens: calibration, held-out and evaluation samples.
        criterion: Scores weights.
        pattern: Makes masks of scores.
        regime: What windows see.
        store: Where hidden states are kept.
        windows: How the model is cut into windows.
        batch_size: Samples per batch.
        memory_limit: Bytes; None for no limit.
        units: What is pruned at once: "window", or another kind where that makes a difference.
        allow_unscored: Whether matrices may stay dense that the criterion cannot score.
        module: Makes a window's LightningModule from (window, masks, variance).
        trainer: Makes its Trainer from `callbacks` and `logger`.
        compute: Device and precision.
        workload: How often windows are run; for the plan.
        recipe: What is done, in the words of the settings; for results and the model card.
        output: The run's folder.
        config: The composed configuration.
        seed: Of everything that is drawn.
        plan_only: Print the plan and stop.
        stream: Have dense weights mapped from their files.
        stop_after: Stop after so many windows.
        resume: Go on with the run in `output`.
    """

    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    source: TextSource
    samples: Samples
    criterion: Criterion
    pattern: Pattern
    regime: Regime
    store: StoreSettings
    windows: Partition
    batch_size: int
    memory_limit: int | None
    units: str
    allow_unscored: bool
    module: Callable[..., LightningModule]
    trainer: Callable[..., Trainer]
    compute: Compute
    workload: Workload
    recipe: dict[str, str]
    output: Path
    config: dict[str, Any]
    seed: int
    plan_only: bool
    stream: bool
    stop_after: int | None
    resume: bool

    def num_arrays(self, kind: str, windows: Sequence[AnyWindow]) -> int:
        """How many arrays of hidden states a run over these windows, of this kind, keeps at most."""
        return count_arrays(
            self.regime,
            self.store.targets,
            kind=kind,
            parallel=side_by_side(windows),
            overlapping=kind == self.windows.by and self.windows.overlapping,
            units=self.units,
        )


@dataclass(frozen=True)
class Loaded:
    """A model that has passed all checks, and what walks over it.

    Attributes:
        model: The dense model; its layers become sparse as the walk goes on.
        windows: Its windows, in order.
        units: What is pruned at once, where that is not each window.
        num_arrays: How many arrays of hidden states there are at most.
        array_bytes: What they take.
        chain: The chain at the first window.
        checkpoint: The model between its windows.
    """

    model: PreTrainedModel
    windows: list[AnyWindow]
    units: list[Window]
    num_arrays: int
    array_bytes: Needed
    chain: Chain
    checkpoint: Checkpoint


def load(job: Job, activations: Path) -> Loaded:
    """Load the model, cut it into windows and check what only weights can tell.

    Args:
        job: The run.
        activations: The folder of hidden states that are kept on disk.

    Raises:
        ValueError: The weights are not whole, the layers do not do what was recorded, do not fall into the windows that
            were asked for, or hold matrices that cannot be scored.
    """
    model = job.model.load()
    files = DenseFiles.of(model, job.model.files()) if job.stream else None
    if isinstance(files, str):
        log.info("the model is in memory as a whole: %s", files)
        files = None
    if files is None:
        _into_memory(model)
    checkpoint = Checkpoint(model, job.compute.device, files=files)
    samples = job.samples
    lengths = {"data.length": samples.calibration_ST.shape[1], "data.evaluation_length": samples.evaluation_ST.shape[1]}
    examine(model, samples.calibration_ST, lengths=lengths)
    windows, units = job.windows.cut(model), _units(job, model)
    check_units(units, windows)
    if job.windows.by == "matrix":
        check_regime([window.matrix for window in windows if isinstance(window, MatrixWindow)], job.regime)
    check_halves(windows, job.regime, recompute=job.store.recompute)
    layers = {id(window.span): window.span for window in windows}.values()
    found = [matrix for layer in layers for matrix in layer.matrices()]
    check_scored(found, allow_unscored=job.allow_unscored)
    check_pattern(found, job.pattern)
    tokens_ST = torch.cat([job.samples.calibration_ST, job.samples.held_out_ST])
    shape = job.samples.shape(model.config.get_text_config().hidden_size)
    num_arrays = job.num_arrays(job.windows.by, windows)
    job.store.check(activations, shape, num_arrays, job.memory_limit)
    store = job.store.open(activations, shape, num_arrays, job.memory_limit)
    chain = Chain(
        Decoder(model, job.compute.device),
        tokens_ST,
        num_samples=len(job.samples.calibration_ST),
        batch_size=job.batch_size,
        compute=job.compute,
        regime=job.regime,
        store=store,
        recompute=job.store.recompute,
    )
    checkpoint.unmap()
    return Loaded(model, windows, units, num_arrays, _taken(store, shape, num_arrays), chain, checkpoint)


def _units(job: Job, model: PreTrainedModel) -> list[Window]:
    """What is pruned at once, where that is not each window."""
    try:
        return [] if job.units == "window" else layer_windows(model, by=job.units)
    except ValueError as error:  # it advises another kind of windows
        raise ValueError(f"prune_by=half: {str(error).partition(';')[0]}; use prune_by=block.") from error


def _taken(store: Store, shape: Sequence[int], count: int) -> Needed:
    """What `count` arrays of this shape take, where they are kept."""
    size = count * math.prod(shape) * store.dtype.itemsize
    return Needed(0, size) if isinstance(store, DiskStore) else Needed(size, 0)


def _into_memory(model: PreTrainedModel) -> None:
    """Read what is mapped of a model's weights."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
