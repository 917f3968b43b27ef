"""A run, once its parts are objects: load, plan, evaluate, walk, save, read back, evaluate, report.

The model that was saved is dropped before the checkpoint is read back, so that one model at a time is in memory; the
pruned one is the dense one read again, times the masks.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning import LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_recon.blocks import Decoder
from lit_recon.captured import check_regime
from lit_recon.chain import Chain
from lit_recon.checkpoint import Checkpoint, PackedMasks
from lit_recon.compute import Compute
from lit_recon.criteria import Criterion
from lit_recon.data.source import Samples, TextSource
from lit_recon.driver import walk
from lit_recon.evaluate import Protocol, final_states, perplexity, relative_error
from lit_recon.examine import examine
from lit_recon.logger import RunLogger
from lit_recon.masks import Pattern
from lit_recon.metrics import Clock, peak_memory_bytes, release_memory, reset_peak_memory
from lit_recon.models import HubModel, LanguageModel
from lit_recon.plan import Plan, Workload, make_plan
from lit_recon.plots import duration
from lit_recon.progress import WalkProgress
from lit_recon.pruning import Pruner, check_units
from lit_recon.reconstruction import Reconstructor, WindowResult
from lit_recon.regime import Regime
from lit_recon.report import write_report
from lit_recon.results import Results, model_card, sparsity, table
from lit_recon.startup import Refusal, check_pattern, check_scored, clear_output
from lit_recon.windows import AnyWindow, Window

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A checked run: what `run` needs, as objects."""

    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    source: TextSource
    samples: Samples
    criterion: Criterion
    pattern: Pattern
    regime: Regime
    windows: Callable[[PreTrainedModel], list[AnyWindow]]
    kind: str
    size: int
    units: Callable[[PreTrainedModel], list[Window]] | None
    allow_unscored: bool
    module: Callable[..., LightningModule]
    trainer: Callable[..., Trainer]
    compute: Compute
    workload: Workload
    recipe: dict[str, str]
    output: Path
    config: str
    seed: int
    plan_only: bool


def run(job: Job, console: Console) -> None:
    """Do it all, and leave behind the files of a run."""
    clock = Clock()
    seed_everything(job.seed, verbose=False)
    perplexities: dict[str, float] = {}
    walked = reconstruct(job, clock, console, perplexities)
    if walked is None:
        return
    release_memory()  # the model that was saved, before it is read back
    errors = read_back(job, walked, clock, perplexities)
    results = Results(
        perplexity={state: perplexities[state] for state in ("dense", "pruned", "reconstructed")},
        relative_error={state: errors[state] for state in ("pruned", "reconstructed")},
        protocol=walked.protocol,
        model={
            "name": job.model.describe(),
            "parameters": walked.plan.parameters,
            "prunable_parameters": walked.plan.prunable,
            "covered": walked.plan.prunable / walked.plan.parameters,
        },
        recipe=job.recipe,
        sparsity=sparsity(walked.masks, walked.plan) | {"by_magnitude": walked.by_magnitude},
        windows=walked.windows,
        seconds={name: round(value, 3) for name, value in (clock.seconds | {"total": clock.total()}).items()},
        peak_memory_bytes=max(walked.peak_bytes, peak_memory_bytes(job.compute.device)),
        walk_peak_memory_bytes=walked.walk_peak_bytes,
        predicted={"seconds": round(walked.plan.seconds, 1), "peak_memory_bytes": walked.plan.peak_bytes},
        tokens={"calibration": job.samples.num_tokens},
        seed=job.seed,
    )
    walked.logger.log_results(results.as_dict())
    walked.logger.close()
    results.save(job.output / "results.json")
    write_report(job.output)
    console.print(table(results, job.output))


@dataclass(frozen=True)
class Walked:
    """What is left of a walk once the model has been saved."""

    masks: PackedMasks
    windows: list[WindowResult]
    plan: Plan
    protocol: Protocol
    logger: RunLogger
    logits_BTV: Tensor
    dense_STD: Tensor  # the dense model's final states on the held-out samples
    by_magnitude: list[str]
    peak_bytes: int
    walk_peak_bytes: int


@dataclass(frozen=True)
class Loaded:
    """A model that has passed all checks, and what walks over it."""

    model: PreTrainedModel
    windows: list[AnyWindow]
    units: list[Window]
    chain: Chain
    checkpoint: Checkpoint


def load(job: Job) -> Loaded:
    """Load the model, cut it into windows and check what only weights can tell.

    Raises:
        ValueError: The weights are not whole, the layers do not do what was recorded, do not fall into the windows that
            were asked for, or hold matrices that cannot be scored.
    """
    model = job.model.load()
    examine(model, job.samples.calibration_ST)
    windows, units = job.windows(model), job.units(model) if job.units else []
    check_units(units, windows)
    check_regime(windows, job.regime)
    layers = {id(window.span): window.span for window in windows}.values()
    found = [matrix for layer in layers for matrix in layer.matrices()]
    check_scored(found, allow_unscored=job.allow_unscored)
    check_pattern(found, job.pattern)
    chain = Chain(
        Decoder(model, job.compute.device),
        torch.cat([job.samples.calibration_ST, job.samples.held_out_ST]),
        num_samples=len(job.samples.calibration_ST),
        batch_size=job.source.batch_size,
        compute=job.compute,
        regime=job.regime,
    )
    return Loaded(model, windows, units, chain, Checkpoint(model, job.compute.device))


def reconstruct(job: Job, clock: Clock, console: Console, perplexities: dict[str, float]) -> Walked | None:
    """Load, plan, evaluate the dense model, walk and save; the model is gone when this returns. None: only planned.

    Raises:
        Refusal: What `load` finds; nothing has been written then.
    """
    try:
        with clock.phase("load"):
            loaded = load(job)
    except ValueError as error:
        raise Refusal(str(error)) from error
    described = job.source.describe("evaluation")
    protocol = Protocol.of(job.samples.evaluation_ST, dataset=described, precision=job.compute.precision)
    plan = make_plan(loaded.windows, loaded.chain, job.workload, kind=job.kind, size=job.size)
    _show_plan(job, plan, protocol, console)
    if job.plan_only:
        return None
    clear_output(job.output)
    (job.output / "config.yaml").write_text(job.config, encoding="utf-8")
    perplexities["dense"] = _evaluate(loaded.model, job, clock)
    before = peak_memory_bytes(job.compute.device)
    reset_peak_memory(job.compute.device)
    logger, progress = RunLogger(job.output), WalkProgress(console, len(loaded.windows))
    results, by_magnitude = _walk(job, loaded, clock, logger, progress)
    walk_peak = peak_memory_bytes(job.compute.device)
    with clock.phase("commit"):
        loaded.checkpoint.masks.save(job.output / "masks.safetensors")
        card = model_card(job.model.describe(), job.recipe, plan, results)
        loaded.checkpoint.save(job.output / "checkpoint", job.tokenizer, card)
    dense_STD = loaded.chain.dense.states_STD[loaded.chain.num_samples :].clone() if loaded.chain.dense else None
    if dense_STD is None:
        dense_STD = _final_states(job.model.load(), job)
    logits_BTV, masks = _some_logits(loaded.model, job), loaded.checkpoint.masks
    return Walked(
        masks, results, plan, protocol, logger, logits_BTV, dense_STD, by_magnitude, max(before, walk_peak), walk_peak
    )


def _walk(
    job: Job, loaded: Loaded, clock: Clock, logger: RunLogger, progress: WalkProgress
) -> tuple[list[WindowResult], list[str]]:
    """The walk; what became of the windows, and of which experts no token was seen."""
    pruner = Pruner(job.criterion, job.pattern, loaded.chain, units=loaded.units)
    reconstructor = Reconstructor(
        job.module, job.trainer, logger=logger, device=job.compute.device, seed=job.seed, callbacks=[progress]
    )
    try:
        with progress:
            results = walk(
                loaded.windows,
                chain=loaded.chain,
                pruner=pruner,
                reconstructor=reconstructor,
                checkpoint=loaded.checkpoint,
                clock=clock,
                listeners=[progress],
            )
    except KeyboardInterrupt as error:
        logger.close()
        done = f"{len(progress.done)} of {len(loaded.windows)} windows were done"
        names = f" ({progress.done[0].name} to {progress.done[-1].name})" if progress.done else ""
        raise KeyboardInterrupt(f"{done}{names}; {job.output} holds their curves, and no checkpoint") from error
    if pruner.by_magnitude:
        some = ", ".join(pruner.by_magnitude[:3]) + (", ..." if len(pruner.by_magnitude) > 3 else "")
        log.warning(
            "%d experts saw no token of the calibration samples and were pruned by magnitude: %s (all in results.json)",
            len(pruner.by_magnitude),
            some,
        )
    return results, pruner.by_magnitude


def read_back(job: Job, walked: Walked, clock: Clock, perplexities: dict[str, float]) -> dict[str, float]:
    """Read the checkpoint as a user will, check and evaluate it; then the pruned model, dense weights times masks.

    Returns:
        The relative errors of both models' final hidden states, on the held-out samples.
    """
    with clock.phase("load"):
        model = HubModel(str(job.output / "checkpoint")).load()
    walked.masks.check(model)
    if not torch.equal(_some_logits(model, job), walked.logits_BTV):
        raise RuntimeError(f"{job.output / 'checkpoint'}: the model that was read back computes other logits.")
    perplexities["reconstructed"] = _evaluate(model, job, clock)
    errors = {"reconstructed": _error(model, walked, job, clock)}
    del model
    with clock.phase("load"):
        model = job.model.load()
    walked.masks.apply(model)
    perplexities["pruned"] = _evaluate(model, job, clock)
    return errors | {"pruned": _error(model, walked, job, clock)}


def _error(model: PreTrainedModel, walked: Walked, job: Job, clock: Clock) -> float:
    with clock.phase("evaluate"):
        return relative_error(_final_states(model, job), walked.dense_STD, job.samples.held_out_ST)


@torch.no_grad()
def _final_states(model: PreTrainedModel, job: Job) -> Tensor:
    decoder = Decoder(model, job.compute.device)
    return final_states(decoder, job.samples.held_out_ST, batch_size=job.source.batch_size, compute=job.compute)


def _evaluate(model: PreTrainedModel, job: Job, clock: Clock) -> float:
    with clock.phase("evaluate"):
        tokens_ST = job.samples.evaluation_ST
        batch_size = max(1, job.source.batch_size * job.source.length // tokens_ST.shape[1])  # the tokens of a batch
        return perplexity(model, tokens_ST, batch_size=batch_size, compute=job.compute)


@torch.no_grad()
def _some_logits(model: PreTrainedModel, job: Job) -> Tensor:
    return model(job.samples.evaluation_ST[:1, :64], use_cache=False).logits


def _show_plan(job: Job, plan: Plan, protocol: Protocol, console: Console) -> None:
    tokens = job.samples.num_tokens
    for name, text in {
        "model": f"{job.model.describe()}, {plan.parameters / 1e6:.1f} M parameters",
        "prune": f"{plan.prunable * job.pattern.sparsity / plan.parameters:.1%} of the parameters: "
        f"{job.pattern.describe()} by {job.recipe['criterion']}, in {plan.prunable / plan.parameters:.1%} of them"
        + (f"; {plan.unscored} matrices stay dense" if plan.unscored else "")
        + (f"; {plan.routers} routers stay dense" if plan.routers else ""),
        "reconstruct": f"{plan.windows} windows ({job.recipe['windows']}), "
        + ("solved exactly, " if job.workload.uses_moments else f"{plan.steps} steps each, ")
        + f"on {tokens} tokens of {job.samples.description}",
        "compute": f"{job.compute.device.type}, {job.compute.precision}, masters in float32",
        "evaluate": protocol.describe(),
        "predicted": f"about {duration(plan.seconds)}, peak memory {plan.peak_bytes / 1e9:.2f} GB",
        "by window": ", ".join(f"{name} {peak / 1e9:.2f} GB" for name, peak in plan.peaks_by_kind.items()),
        "output": str(job.output),
    }.items():
        console.print(f"[bold]{name:12}[/bold]{escape(text)}", highlight=False)
