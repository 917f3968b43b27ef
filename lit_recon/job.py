"""A run, once its parts are objects: load, plan, evaluate, walk, save, read back, evaluate, report.

The model that was saved is dropped before the checkpoint is read back, so that one model at a time is in memory; the
pruned one is the dense one read again, times the masks.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning import LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_recon.activations import Chain
from lit_recon.blocks import Decoder
from lit_recon.checkpoint import Checkpoint, PackedMasks
from lit_recon.compute import Compute
from lit_recon.criteria import Criterion
from lit_recon.data.source import Samples, TextSource
from lit_recon.driver import walk
from lit_recon.evaluate import Protocol, perplexity
from lit_recon.logger import RunLogger
from lit_recon.masks import Pattern
from lit_recon.metrics import Clock, peak_memory_bytes
from lit_recon.models import HubModel, LanguageModel
from lit_recon.plan import Plan, Workload, make_plan
from lit_recon.plots import duration
from lit_recon.progress import WalkProgress
from lit_recon.reconstruction import Reconstructor, WindowResult
from lit_recon.report import write_report
from lit_recon.results import Results, model_card, sparsity, table
from lit_recon.startup import clear_output
from lit_recon.windows import Window


@dataclass(frozen=True)
class Job:
    """A checked run: what `run` needs, as objects."""

    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    source: TextSource
    samples: Samples
    criterion: Criterion
    pattern: Pattern
    windows: Callable[[PreTrainedModel], list[Window]]
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
    gc.collect()  # the model that was saved, before it is read back
    read_back(job, walked, clock, perplexities)
    results = Results(
        perplexity={state: perplexities[state] for state in ("dense", "pruned", "reconstructed")},
        protocol=walked.protocol,
        model={
            "name": job.model.describe(),
            "parameters": walked.plan.parameters,
            "prunable_parameters": walked.plan.prunable,
            "covered": walked.plan.prunable / walked.plan.parameters,
        },
        recipe=job.recipe,
        sparsity=sparsity(walked.masks, walked.plan),
        windows=walked.windows,
        seconds={name: round(value, 3) for name, value in (clock.seconds | {"total": clock.total()}).items()},
        peak_memory_bytes=peak_memory_bytes(job.compute.device),
        tokens={"calibration": job.samples.calibration_ST.numel()},
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


def reconstruct(job: Job, clock: Clock, console: Console, perplexities: dict[str, float]) -> Walked | None:
    """Load, plan, evaluate the dense model, walk and save; the model is gone when this returns. None: only planned."""
    with clock.phase("load"):
        model = job.model.load()
        windows, checkpoint = job.windows(model), Checkpoint(model, job.compute.device)
        chain = Chain(
            Decoder(model, job.compute.device),
            torch.cat([job.samples.calibration_ST, job.samples.held_out_ST]),
            num_samples=len(job.samples.calibration_ST),
            batch_size=job.source.batch_size,
            compute=job.compute,
        )
    protocol = _protocol(job)
    plan = make_plan(windows, chain, job.workload)
    _show_plan(job, plan, protocol, console)
    if job.plan_only:
        return None
    clear_output(job.output)
    (job.output / "config.yaml").write_text(job.config, encoding="utf-8")
    perplexities["dense"] = _evaluate(model, job, clock)
    logger, progress = RunLogger(job.output), WalkProgress(console, len(windows))
    reconstructor = Reconstructor(
        job.module,
        job.trainer,
        chain=chain,
        logger=logger,
        batch_size=job.source.batch_size,
        seed=job.seed,
        callbacks=[progress],
    )
    try:
        with progress:
            results = walk(
                windows,
                chain=chain,
                criterion=job.criterion,
                pattern=job.pattern,
                reconstructor=reconstructor,
                checkpoint=checkpoint,
                clock=clock,
                listeners=[progress],
            )
    except KeyboardInterrupt as error:
        logger.close()
        done = f"{len(progress.done)} of {len(windows)} windows were done"
        names = f" ({progress.done[0].name} to {progress.done[-1].name})" if progress.done else ""
        raise KeyboardInterrupt(f"{done}{names}; {job.output} holds their curves, and no checkpoint") from error
    with clock.phase("commit"):
        checkpoint.masks.save(job.output / "masks.safetensors")
        card = model_card(job.model.describe(), job.recipe, plan, results)
        checkpoint.save(job.output / "checkpoint", job.tokenizer, card)
    return Walked(checkpoint.masks, results, plan, protocol, logger, _some_logits(model, job))


def read_back(job: Job, walked: Walked, clock: Clock, perplexities: dict[str, float]) -> None:
    """Read the checkpoint as a user will, check and evaluate it; then the pruned model, dense weights times masks."""
    with clock.phase("load"):
        model = HubModel(str(job.output / "checkpoint")).load()
    walked.masks.check(model)
    if not torch.equal(_some_logits(model, job), walked.logits_BTV):
        raise RuntimeError(f"{job.output / 'checkpoint'}: the model that was read back computes other logits.")
    perplexities["reconstructed"] = _evaluate(model, job, clock)
    del model
    with clock.phase("load"):
        model = job.model.load()
    walked.masks.apply(model)
    perplexities["pruned"] = _evaluate(model, job, clock)


def _evaluate(model: PreTrainedModel, job: Job, clock: Clock) -> float:
    with clock.phase("evaluate"):
        tokens_ST = job.samples.evaluation_ST
        batch_size = max(1, job.source.batch_size * job.source.length // tokens_ST.shape[1])  # the tokens of a batch
        return perplexity(model, tokens_ST, batch_size=batch_size, compute=job.compute)


@torch.no_grad()
def _some_logits(model: PreTrainedModel, job: Job) -> Tensor:
    return model(job.samples.evaluation_ST[:1, :64], use_cache=False).logits


def _protocol(job: Job) -> Protocol:
    windows, context = job.samples.evaluation_ST.shape
    return Protocol(
        dataset=job.source.describe("evaluation"),
        split="evaluation",
        context=context,
        windows=windows,
        tokens=windows * (context - 1),
        precision=job.compute.precision,
    )


def _show_plan(job: Job, plan: Plan, protocol: Protocol, console: Console) -> None:
    tokens = job.samples.calibration_ST.numel()
    for name, text in {
        "model": f"{job.model.describe()}, {plan.parameters / 1e6:.1f} M parameters",
        "prune": f"{plan.prunable * job.pattern.sparsity / plan.parameters:.1%} of the parameters: "
        f"{job.pattern.describe()} by {job.recipe['criterion']}, in {plan.prunable / plan.parameters:.1%} of them"
        + (f"; {plan.unscored} matrices stay dense" if plan.unscored else ""),
        "reconstruct": f"{plan.windows} windows ({job.recipe['windows']}), {plan.steps} steps each, "
        f"on {tokens} tokens of {job.samples.description}",
        "compute": f"{job.compute.device.type}, {job.compute.precision}, masters in float32",
        "evaluate": protocol.describe(),
        "predicted": f"about {duration(plan.seconds)}, peak memory {plan.peak_bytes / 1e9:.2f} GB",
        "output": str(job.output),
    }.items():
        console.print(f"[bold]{name:12}[/bold]{escape(text)}", highlight=False)
