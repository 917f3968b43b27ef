"""The course of a run: load, plan, measure the dense model, walk, read the checkpoint back, measure, report.

A run writes its configuration first and a commit after each window, so that it can be taken up whatever ends it. What
is only needed for that is removed once results.json is there.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape

from lit_recon.activations.disk_store import SUFFIX, DiskStore, nearest
from lit_recon.evaluate.evaluator import Judge, Saved, read_back
from lit_recon.evaluate.perplexity import Protocol
from lit_recon.fit.job import ACTIVATIONS, Job, load
from lit_recon.fit.output.folder import begin_output, begun, check_disk, draw_report, left_behind
from lit_recon.fit.output.results import Results, sparsity, table
from lit_recon.fit.plan.estimate import Plan
from lit_recon.fit.plan.memory_limit import Choice, adopt, check_limit, choose, plan_of
from lit_recon.fit.signature import changes, signature
from lit_recon.fit.walk_callbacks import Course, Setting
from lit_recon.model.windows import AnyWindow, HalfWindow
from lit_recon.reconstruction.tensorboard import RunLogger
from lit_recon.reconstruction.window_fit import WindowResult
from lit_recon.system.clock import Clock
from lit_recon.system.command_line import Refusal
from lit_recon.system.commits import Commit, Commits
from lit_recon.system.memory import peak_memory_bytes, release_memory, reset_peak_memory
from lit_recon.system.signals import protected, stoppable
from lit_recon.system.units import duration, in_gb

PRUNED_STATES = ("pruned", "reconstructed")


def run(job: Job, console: Console) -> None:
    """Do it all, and leave behind the files of a run.

    Raises:
        Refusal: What only the model's weights or an earlier run's commits can tell; nothing has been written then.
        CommitError: The disk is full or read-only; the message says how to go on.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is done is kept, and the message says how to go on.
    """
    clock = Clock()
    if job.plan_only:
        with TemporaryDirectory(dir=nearest(job.output)) as scratch:
            commits = Commits(job.output / "commits")
            _open(job, commits, clock, console, activations=Path(scratch))[0].loaded.chain.store.close()
        return
    commits = Commits(job.output / "commits", resumed=job.resume)
    # Errors of what is written beside the commits are told like theirs.
    with commits.writing(job.output), stoppable(), begun(job.output, _config(job), resumed=job.resume):
        walked = _walk(job, commits, clock, console)
        if walked is not None:
            release_memory()  # the model that was saved, before it is read back
            console.print(table(_conclude(walked, clock), job.output))


def _open(
    job: Job, commits: Commits, clock: Clock, console: Console, *, activations: Path
) -> tuple[Setting, dict[str, Any], Commit | None]:
    """Load and plan a run, find where it is taken up, and show what will be done.

    Raises:
        Refusal: What `load` finds, or the run cannot be taken up: its commits are damaged, or something has changed.
    """
    try:
        with clock.phase("load"):
            commit = commits.newest() if job.resume else None
            if commit:  # what "auto" has chosen
                job = replace(job, store=replace(job.store, kind=commit.state["store"]))
            loaded = load(job, activations)
            facts: dict[str, Any] = {"signature": signature(job)}
            if commit and (changed := changes(commit.state["signature"], facts["signature"])):
                raise ValueError(f"resume={job.output}: {'; '.join(changed)}. Undo that, or start a new run.")
            if job.memory_limit is not None or commit:
                choice = Choice(**commit.state["choice"]) if commit else choose(job, loaded)
                job, loaded = adopt(choice, job, loaded)
            plan = plan_of(job, loaded)
            if commit and job.memory_limit is not None:
                check_limit(plan, job)
            if not job.plan_only:
                there = sum(path.stat().st_size for path in activations.glob(f"*{SUFFIX}")) + left_behind(job.output)
                check_disk(job.output, plan.disk_bytes - there)
    except ValueError as error:
        shutil.rmtree(activations, ignore_errors=True)
        raise Refusal(str(error)) from error
    for name, text in _lines(job, plan, commit, loaded.windows).items():
        console.print(f"[bold]{name:12}[/bold]{escape(text)}", highlight=False)
    facts["choice"] = asdict(Choice(job.windows.by, job.batch_size))
    facts["store"] = "disk" if isinstance(loaded.chain.store, DiskStore) else "memory"
    return Setting(job, loaded, plan, commits, console, clock), facts, commit


@dataclass(frozen=True)
class _Walked:
    """What is left of a walk once the model has been saved."""

    job: Job
    saved: Saved
    windows: list[WindowResult]
    plan: Plan
    logger: RunLogger
    dense_perplexity: float
    by_magnitude: list[str]
    peak_bytes: int
    walk_peak_bytes: int


def _walk(job: Job, commits: Commits, clock: Clock, console: Console) -> _Walked | None:
    """Load, measure the dense model, walk; the model is gone when this returns. None: stopped before the end."""
    setting, facts, commit = _open(job, commits, clock, console, activations=job.output / ACTIVATIONS)
    try:
        with setting.loaded.chain.store:
            return _walk_over(setting, facts, commit)
    finally:
        shutil.rmtree(job.output / ACTIVATIONS, ignore_errors=True)


def _walk_over(setting: Setting, facts: dict[str, Any], commit: Commit | None) -> _Walked | None:
    job, loaded, clock = setting.job, setting.loaded, setting.clock
    device, judge = job.compute.device, _judge(job, clock)
    if commit is None:
        with protected():
            begin_output(job.output, _config(job))
        facts["dense_perplexity"] = judge.perplexity(loaded.model)
    else:
        facts["dense_perplexity"] = commit.state["dense_perplexity"]
    loaded.checkpoint.unmap()
    release_memory()
    before = peak_memory_bytes(device)
    reset_peak_memory(device)
    course = Course(setting, facts=facts, commit=commit)
    windows = course.run()
    walk_peak = peak_memory_bytes(device)
    if len(windows) < len(loaded.windows):
        setting.console.print(course.stopped(), highlight=False, soft_wrap=True)
        return None
    chain, dense_STD = loaded.chain, None
    if chain.dense and chain.dense.states_STD.dtype == torch.float32:
        dense_STD = chain.dense.states_STD[chain.num_samples :].clone()
    saved = Saved(job.output / "checkpoint", loaded.checkpoint.masks, judge.logits(loaded.model), dense_STD)
    return _Walked(
        job,
        saved,
        windows,
        setting.plan,
        course.logger,
        facts["dense_perplexity"],
        course.pruner.by_magnitude,
        max(before, walk_peak),
        walk_peak,
    )


def _conclude(walked: _Walked, clock: Clock) -> Results:
    """Read the checkpoint back, measure it, and write results and report."""
    job, plan, saved = walked.job, walked.plan, walked.saved
    perplexities, errors = read_back(saved, job.model, _judge(job, clock))
    results = Results(
        perplexity={"dense": walked.dense_perplexity} | {state: perplexities[state] for state in PRUNED_STATES},
        relative_error={state: errors[state] for state in PRUNED_STATES},
        protocol=_protocol(job),
        model={
            "name": job.model.describe(),
            "parameters": plan.parameters,
            "prunable_parameters": plan.prunable,
            "covered": plan.prunable / plan.parameters,
        },
        recipe=job.recipe,
        sparsity=sparsity(saved.masks, plan) | {"by_magnitude": walked.by_magnitude},
        windows=walked.windows,
        seconds={name: round(value, 3) for name, value in (clock.seconds | {"total": clock.total()}).items()},
        peak_memory_bytes=max(walked.peak_bytes, peak_memory_bytes(job.compute.device)),
        walk_peak_memory_bytes=walked.walk_peak_bytes,
        predicted={
            "seconds": round(plan.seconds, 1),
            "peak_memory_bytes": plan.peak_bytes,
            "walk_peak_memory_bytes": plan.walk_peak_bytes,
        },
        tokens={"calibration": job.samples.num_tokens},
        seed=job.seed,
    )
    walked.logger.log_results(results.as_dict())
    walked.logger.close()
    results.save(job.output / "results.json")
    draw_report(job.output)
    return results


def _config(job: Job) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(job.config))


def _judge(job: Job, clock: Clock) -> Judge:
    return Judge(job.samples, job.batch_size * job.source.length, job.compute, clock)


def _protocol(job: Job) -> Protocol:
    described = job.source.describe("evaluation")
    return Protocol.of(job.samples.evaluation_ST, dataset=described, precision=job.compute.precision)


def _lines(job: Job, plan: Plan, commit: Commit | None, windows: Sequence[AnyWindow]) -> dict[str, str]:
    """What will be done, and what it takes."""
    tokens = job.samples.num_tokens
    shared = sorted({name for window in windows if isinstance(window, HalfWindow) for name in window.split.shared})
    lines = {
        "model": f"{job.model.describe()}, {plan.parameters / 1e6:.1f} M parameters",
        "prune": f"{plan.prunable * job.pattern.sparsity / plan.parameters:.1%} of the parameters: "
        f"{job.pattern.describe()} by {job.recipe['criterion']}, in {plan.prunable / plan.parameters:.1%} of them"
        + (f"; {plan.unscored} matrices stay dense" if plan.unscored else "")
        + (f"; {plan.routers} routers stay dense" if plan.routers else ""),
        "reconstruct": f"{plan.windows} windows ({job.recipe['windows']}), "
        + ("solved exactly, " if job.workload.uses_moments else f"{plan.steps} steps each, ")
        + f"on {tokens} tokens of {job.samples.description}"
        + (f"; {', '.join(shared)} of both halves, trained in the attention half" if shared else ""),
        "compute": f"{job.compute.device.type}, {job.compute.precision}, masters in float32",
        "evaluate": _protocol(job).describe(),
        "predicted": f"about {duration(plan.seconds)}, peak memory {in_gb(plan.peak_bytes)}"
        + (f" (up to {in_gb(plan.mapped_bytes)} of it mapped from the model's files)" if plan.mapped_bytes else "")
        + f", disk {in_gb(plan.disk_bytes)}",
        "by window": ", ".join(f"{name} {in_gb(peak)}" for name, peak in plan.peaks_by_kind.items()),
        "output": str(job.output),
    }
    if job.resume:
        done = len(commit.state["windows"]) if commit else 0
        lines["resume"] = f"{done} of {plan.windows} windows are done" if done else "no window was done: from the start"
    return lines
