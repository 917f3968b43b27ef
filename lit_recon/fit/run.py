"""A run: load, plan, measure the dense model, walk, read the checkpoint back, measure, report.

A run writes its configuration first and a commit after each window, so that it can be resumed whatever ends it. What
is only needed for that is removed once results.json is there.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import ModelCardData
from omegaconf import OmegaConf
from rich.markup import escape

from lit_recon.activations.disk_store import SUFFIX, nearest
from lit_recon.activations.store import kind_of
from lit_recon.evaluate.evaluator import Evaluator
from lit_recon.evaluate.perplexity import EvaluationProtocol
from lit_recon.fit.allocate import Allocated, target_sparsity
from lit_recon.fit.dense_measure import DenseMeasure
from lit_recon.fit.job import Job
from lit_recon.fit.output.card import card_metadata, model_card
from lit_recon.fit.output.checkpoint import Companions
from lit_recon.fit.output.folder import (
    ACTIVATIONS,
    begin_output,
    begun,
    check_disk,
    draw_report,
    left_behind,
    made,
)
from lit_recon.fit.output.provenance import provenance
from lit_recon.fit.output.read_back import Saved, read_back
from lit_recon.fit.output.results import Results, compute_facts, model_facts, sparsity, table, token_counts
from lit_recon.fit.plan.description import describe_plan
from lit_recon.fit.plan.estimate import Plan
from lit_recon.fit.plan.memory_limit import Choice, adopt, check_limit, choose, plan_job
from lit_recon.fit.resume_config import mend_config
from lit_recon.fit.resume_point import ResumePoint
from lit_recon.fit.session import Session, open_session, reconstruct
from lit_recon.fit.signature import changes, differences, machine, measured_by, signature
from lit_recon.fit.walk_callbacks import CheckpointWriter, ProgressBar
from lit_recon.model.loading import auto_class
from lit_recon.model.mapped_files import DenseFiles
from lit_recon.model.windows import WindowKind
from lit_recon.modules.norms_biases import prepare_model
from lit_recon.pruning.decision import INSTEAD
from lit_recon.reconstruction.fit_state import FitCommits
from lit_recon.reconstruction.tensorboard import RunLogger
from lit_recon.reconstruction.window_result import WindowResult
from lit_recon.system.atomic_files import remove
from lit_recon.system.clock import WHOLE_WALK, Clock
from lit_recon.system.command_line import Refusal
from lit_recon.system.commits import Commit, Commits
from lit_recon.system.console import Console
from lit_recon.system.device import waiting_for
from lit_recon.system.finite import NotFinite
from lit_recon.system.memory import peaks_of, release_memory
from lit_recon.system.signals import protected

log = logging.getLogger(__name__)

EVALUATED = 2**13  # tokens that a GPU runs at once at least, unless memory is limited
PRUNED_STATES = ("pruned", "reconstructed")


def run(job: Job, console: Console) -> Path | None:
    """Do it all, and leave behind the files of a run.

    Returns:
        Its folder, once the run is finished; None where it was only planned, or is to stop before its end.

    Raises:
        Refusal: What only the model's weights or an earlier run's commits show; nothing has been written then.
        CommitError: The disk is full or read-only; the message says how to resume.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is done is kept, and the message says how to resume.
    """
    device, folder = job.execution.compute.device, job.output.folder
    memory, host = peaks_of(device)
    clock = Clock(memory=memory, host=host, wait=waiting_for(device))
    if job.output.plan_only:
        with TemporaryDirectory(prefix="lit_recon.", dir=nearest(folder)) as scratch:
            opened = _open(job, Commits(folder / "commits"), clock, console, activations=Path(scratch))
            opened.session.chain.passes.store.close()
        return None
    with made(job.output) as output:
        job, folder = replace(job, output=output), output.folder
        commits = Commits(folder / "commits", resumed=output.resume)
        # Errors of what is written besides the commits are explained like theirs.
        with commits.writing(folder), begun(output, _config(job)):
            walked = _walk(job, commits, clock, console)
            if walked is None:
                return None
            release_memory()  # the model that was saved, before it is read back
            console.print(table(_conclude(walked, clock), folder))
    return folder


@dataclass(frozen=True)
class _Opened:
    """A run whose model is loaded, and where it is resumed.

    Attributes:
        job: The run, with what its memory limit chose.
        session: The model and what walks over it.
        plan: What it will take.
        described: The plan in words.
        dense: Measures the dense model.
        facts: What each of its commits says besides its own.
        commit: The commit from which it is resumed.
    """

    job: Job
    session: Session
    plan: Plan
    described: dict[str, str]
    dense: DenseMeasure
    facts: dict[str, Any]
    commit: Commit | None


def _open(job: Job, commits: Commits, clock: Clock, console: Console, *, activations: Path) -> _Opened:
    """Load and plan a run, find where it is resumed, and show what will be done.

    Raises:
        Refusal: What loading finds, or the run cannot be resumed: its commits are damaged, or something has changed.
    """
    folder, limited = job.output.folder, job.execution.memory_limit is not None
    try:
        with clock.phase("load"):
            commit = commits.newest() if job.output.resume else None
            if commit:  # what "auto" has chosen
                store = replace(job.execution.store, kind=commit.state["store"])
                job = replace(job, execution=replace(job.execution, store=store))
            known = Allocated.from_json(commit.state["allocated"]) if commit else None
            session = load(job, activations, clock, allocated=known)
            facts: dict[str, Any] = {
                "signature": signature(job),
                "machine": machine(job.execution.compute.device),
                "allocated": session.allocated.as_json(),
            }
            if commit and (changed := changes(commit.state["signature"], facts["signature"])):
                raise ValueError(f"resume={folder}: {'; '.join(changed)}. Undo that, or start a new run.")
            for name, old, new in differences(commit.state["machine"], facts["machine"]) if commit else ():
                told = "resume=%s: %s was %s and is %s; the run is resumed, but its last bits may differ"
                log.warning(told, folder, name, old, new)
            if limited or commit:
                choice = Choice(**commit.state["choice"]) if commit else choose(job, session)
                job, session = adopt(choice, job, session)
            dense = DenseMeasure(_evaluator(job, clock), {**measured_by(facts["signature"]), **facts["machine"]})
            plan = plan_job(job, session, dense_is_known=dense.is_known)
            if job.source.needs_model:  # generation of its text is over: what that took is known
                plan = replace(plan, peak_bytes=max(plan.peak_bytes, clock.peak()))
            if commit and limited:
                check_limit(plan, job)
            if not job.output.plan_only:
                there = sum(path.stat().st_size for path in activations.glob(f"*{SUFFIX}")) + left_behind(folder)
                check_disk(folder, plan.disk_bytes - there)
    except ValueError as error:
        raise Refusal(str(error)) from error
    done = len(commit.state["windows"]) if commit else 0
    steps = commit.state["fit"]["step"] if commit and commit.state["fit"] else 0
    described = describe_plan(job, plan, session, _protocol(job).describe(), done=done, steps=steps)
    for name, text in described.items():
        console.print(f"[bold]{name:12}[/bold]{escape(text)}", highlight=False)
    facts["choice"] = asdict(Choice(job.method.windows.by, job.execution.batch_size))
    facts["store"] = kind_of(session.chain.passes.store)
    return _Opened(job, session, plan, described, dense, facts, commit)


def load(job: Job, activations: Path, clock: Clock, allocated: Allocated | None = None) -> Session:
    """Load the model of a run, mapped from its files where they hold its weights as they are, and open a session.

    Args:
        job: The run.
        activations: The folder of hidden states that are kept on disk.
        clock: Takes the seconds.
        allocated: What was decided before the walk of the run that is resumed.
    """
    model = job.model.load()
    prepare_model(model, job.method.training.module)
    if said := job.model.describe_left_out():
        log.info("%s; the checkpoint holds them as they are", said)
    found = DenseFiles.from_model(model, job.model.files(), job.model.renamed)
    files = found if isinstance(found, DenseFiles) else None
    if files is None:
        log.info("the model is in memory as a whole: %s", found)
        for tensor in (*model.parameters(), *model.buffers()):  # what is mapped of it is read
            tensor.data = tensor.data.clone()
    return open_session(
        model,
        job.samples,
        job.method,
        job.execution,
        activations=activations,
        files=files,
        clock=clock,
        allocated=allocated,
    )


@dataclass(frozen=True, kw_only=True)
class _Walked:
    """What is left of a walk once the model has been saved."""

    job: Job
    plan: Plan
    saved: Saved
    windows: list[WindowResult]
    logger: RunLogger
    dense: DenseMeasure
    dense_nats: float
    pruned_by: dict[str, list[str]]
    target: dict[str, float]
    provenance: dict[str, Any]


def _walk(job: Job, commits: Commits, clock: Clock, console: Console) -> _Walked | None:
    """Load, measure the dense model, walk; the model is gone when this returns. None: stopped before the end."""
    activations = job.output.folder / ACTIVATIONS
    try:
        opened = _open(job, commits, clock, console, activations=activations)
        with opened.session.chain.passes.store:
            return _walk_over(opened, commits, console)
    finally:
        with suppress(OSError):  # what is read next matters more
            remove(activations)


def _walk_over(opened: _Opened, commits: Commits, console: Console) -> _Walked | None:
    job, session, commit, facts = opened.job, opened.session, opened.commit, opened.facts
    evaluator = _evaluator(job, session.clock)
    if commit is None:
        measured = opened.dense.of(session.model)
        try:
            measured.check(job.execution.compute.precision)
        except NotFinite as error:
            raise Refusal(str(error)) from error
        facts["dense_nats"] = measured.nats
        with protected():
            begin_output(job.output.folder, _config(job))
    else:
        facts["dense_nats"] = commit.state["dense_nats"]
        with protected():
            mend_config(job.output.folder, _config(job))
    with session.clock.phase("load"):
        traced = provenance(job, facts["signature"])
    session.weights.release_pages()
    release_memory()
    with session.clock.part(WHOLE_WALK):
        resume_point = _reconstruct(opened, commits, console)
    if len(resume_point.done) < session.num_fits:
        console.print(resume_point.describe_stop(job.output.folder), highlight=False, soft_wrap=True, markup=False)
        return None
    logits_BTV = evaluator.logits(session.model)
    return _Walked(
        job=job,
        plan=opened.plan,
        saved=Saved(job.output.folder / "checkpoint", resume_point.masks, logits_BTV, resume_point.pruned),
        windows=resume_point.done,
        logger=resume_point.logger,
        dense=opened.dense,
        dense_nats=facts["dense_nats"],
        pruned_by={f"by_{name}": session.pruner.labels(name) for name in INSTEAD},
        target=target_sparsity(job.method, session.pruner.patterns, session.matrices),
        provenance=traced,
    )


def _reconstruct(opened: _Opened, commits: Commits, console: Console) -> ResumePoint:
    """Walk from a commit, or from the start, to the end or to where it is to stop.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says what is kept.
    """
    job, session, commit, folder = opened.job, opened.session, opened.commit, opened.job.output.folder
    names = [window.name for window in session.windows]
    last_step = commit.state["step"] if commit else None
    logger = RunLogger(folder, last_step=last_step, hidden=job.execution.logged.hidden(names))
    logger.log_plan(opened.described, names)
    resume_point = ResumePoint(commits, session, logger, opened.facts)
    if commit:
        resume_point.restore(commit)
    fit_commits = FitCommits(job.method.training.retraining.commit_every, resume_point.on_steps, resume_point.fit_state)
    companions = Companions(job.tokenizer, job.model.companions(), job.model.left_out_tensors())
    metadata = card_metadata(job.model, job.source.hub_datasets())
    checkpoint = CheckpointWriter(folder, companions, resume_point, lambda done: _card(opened, done, metadata))
    together = job.method.windows.by == WindowKind.MATRIX
    progress = ProgressBar(console, session.num_fits, done=resume_point.done, together=together)
    with session.clock.phase("commit"):
        checkpoint.open()
    try:
        with progress:
            reconstruct(
                session,
                job.method,
                job.execution,
                resume_point.masks,
                callbacks=[resume_point, checkpoint, progress],
                trainer_callbacks=[progress],
                logger=logger,
                done=resume_point.done,
                commits=fit_commits,
            )
    except KeyboardInterrupt as stop:
        session.weights.discard()
        _leave(checkpoint, logger)
        raise type(stop)(resume_point.describe_stop(folder)) from stop
    _leave(checkpoint, logger)
    return resume_point


def _leave(checkpoint: CheckpointWriter, logger: RunLogger) -> None:
    """Write what is left to write of a walk, as far as it came."""
    logger.experiment.flush()
    with protected():
        checkpoint.close()


def _card(opened: _Opened, results: Sequence[WindowResult], metadata: ModelCardData) -> str:
    loads = auto_class(opened.session.model.config).__name__
    return model_card(opened.job.model.describe(), opened.job.recipe, opened.plan, results, loads, metadata)


def _conclude(walked: _Walked, clock: Clock) -> Results:
    """Read the checkpoint back, measure it, and write results and report."""
    job, plan, saved, folder = walked.job, walked.plan, walked.saved, walked.job.output.folder
    found = read_back(saved, job.model, walked.dense)
    results = Results(
        nats={"dense": walked.dense_nats} | {state: found.nats[state] for state in PRUNED_STATES},
        relative_error={state: found.errors[state].mean for state in PRUNED_STATES},
        typical_error={state: found.errors[state].typical for state in PRUNED_STATES},
        protocol=_protocol(job),
        model=model_facts(job.model.describe(), plan.parameters, plan.prunable),
        recipe=job.recipe,
        sparsity={
            **sparsity(saved.masks, found.zeros, plan.parameters),
            **walked.pruned_by,
            "target_by_matrix": walked.target,
        },
        windows=walked.windows,
        seconds=clock.summary(),
        peak_memory_bytes=clock.peak(),
        walk_peak_memory_bytes=clock.peak(WHOLE_WALK),
        walk_peak_host_bytes=clock.host_peak(WHOLE_WALK),
        phase_peak_memory_bytes=clock.phase_peaks(),
        predicted={
            "seconds": round(plan.seconds, 1),
            "peak_memory_bytes": plan.peak_bytes,
            "walk_peak_memory_bytes": plan.walk_peak_bytes,
            **({} if plan.host_bytes is None else {"walk_peak_host_bytes": plan.host_bytes}),
        },
        tokens=token_counts(job.samples),
        seed=job.execution.seed,
        compute=compute_facts(job.execution.compute),
        provenance=walked.provenance,
    )
    walked.logger.log_results(results.as_dict())
    walked.logger.close()
    results.save(folder / "results.json")
    draw_report(folder)
    return results


def _config(job: Job) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(job.output.config))


def _evaluator(job: Job, clock: Clock) -> Evaluator:
    tokens = job.execution.batch_size * job.source.length
    if job.execution.compute.device.type == "cuda" and job.execution.memory_limit is None:
        tokens = max(tokens, EVALUATED)
    return Evaluator(job.samples, tokens, job.execution.compute, clock)


def _protocol(job: Job) -> EvaluationProtocol:
    return EvaluationProtocol.from_tokens(
        job.samples.evaluation_ST,
        dataset=job.samples.evaluation_description,
        split=job.samples.evaluation_split,
        opening=job.samples.opening,
        given=job.samples.num_given,
        precision=job.execution.compute.precision,
    )
