"""A limit of memory chooses batch and windows: the paper's finding that quality hardly depends on a window's size.

A smaller batch comes first, with as many more batches per optimizer step, which changes nothing but the time; then the
next smaller kind of window. Single matrices are worse, so they are never chosen. What is mapped from the dense model's
files does not count: the system takes it back when it needs the room.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from lightning import LightningModule

from lit_recon.activations.disk_store import nearest
from lit_recon.activations.store import Needed
from lit_recon.activations.teacher import check_halves
from lit_recon.fit.job import Job, num_arrays
from lit_recon.fit.plan.estimate import Plan, Workload, make_plan
from lit_recon.fit.plan.peak_memory import name_of
from lit_recon.fit.session import Session
from lit_recon.model.windows import AnyWindow, WindowKind
from lit_recon.modules.trained import needs_gram
from lit_recon.system.atomic_files import can_link
from lit_recon.system.units import in_gb

_SLACK = 1.05  # what a process has of its own is measured, and it was another process that chose
ORDER: list[WindowKind] = [kind for kind in reversed(WindowKind) if kind != WindowKind.MATRIX]  # from large to small


@dataclass(frozen=True)
class Choice:
    """Kind of windows and size of batches.

    Attributes:
        kind: Kind of windows.
        batch_size: Samples per batch.
    """

    kind: str
    batch_size: int


class _Need(NamedTuple):
    """Bytes that a choice needs.

    Attributes:
        walk: For the walk over its windows, and evaluation.
        at_once: For training all layers at once; 0 where they are not.
    """

    walk: int
    at_once: int

    def of(self, choice: Choice) -> str:
        """What needs the most of it."""
        what = f"windows={choice.kind}" if self.walk >= self.at_once else "all layers, trained at once,"
        return f"{what} with data.batch_size={choice.batch_size}"


def plan_job(job: Job, session: Session, batch_size: int | None = None, *, dense_is_known: bool = False) -> Plan:
    """The plan of a run as it is, or with another batch size; of one whose dense model was measured, or not."""
    samples, method = job.samples, job.method
    work = Workload(
        method.training.schedule,
        samples.evaluation_ST.numel(),
        needs_gram=needs_gram(method.training.module),
        module=_known(method.training.module),
        solves_first=method.training.fitting.start != "none",
        prunes_only=method.walk == "global",
        retraining=method.training.retraining_schedule,
        keeps_best=method.training.fitting.keep == "best",
        is_anchored=method.training.is_anchored,
        evaluations=2 if dense_is_known else 3,
    )
    return make_plan(
        session,
        work,
        kind=method.windows.by,
        size=method.windows.blocks,
        batch_size=batch_size or job.execution.batch_size,
        array_bytes=_array_bytes(job, session, session.windows),
        linked=can_link(nearest(job.output.folder)),
    )


def _known(module: Callable[..., LightningModule]) -> Callable[..., LightningModule] | None:
    """A module of lit_recon for windows of layers, which can be asked what it trains; None for another."""
    ours = getattr(getattr(module, "func", module), "__module__", "").startswith("lit_recon.")
    return module if ours and not needs_gram(module) else None


def choose(job: Job, session: Session) -> Choice:
    """The largest batch of the largest windows, up to those that were asked for, that fit into the limit.

    Raises:
        ValueError: Nothing fits; the message has the numbers.
    """
    limit = job.execution.memory_limit
    assert limit is not None
    needs = {choice: need for choice, need in _needs(job, session)}
    for choice, need in needs.items():
        if max(need) <= limit:
            return choice
    smallest = min(needs, key=lambda choice: max(needs[choice]))
    need = needs[smallest]
    remedy = (
        "shorter or fewer samples (data.length, data.num_samples), store=disk, or store.targets=recompute"
        if need.walk >= need.at_once
        else "shorter samples (data.length), or walk=local, which trains one window after the other"
    )
    raise ValueError(
        f"memory_limit={in_gb(limit)}: even {need.of(smallest)} need {in_gb(max(need))}, as asked for it would be "
        f"{in_gb(max(needs[next(iter(needs))]))}. Raise the limit, or use {remedy}."
    )


def check_limit(plan: Plan, job: Job) -> None:
    """Check that a run as it is fits into its limit: what it began with is not chosen again when it is resumed.

    Raises:
        ValueError: It does not; the message has the numbers.
    """
    limit, windows = job.execution.memory_limit, job.method.windows
    assert limit is not None
    need = _Need(plan.own_by_kind[name_of(windows.by, windows.blocks)], plan.global_fit.own_bytes)
    if max(need) > _SLACK * limit:
        raise ValueError(
            f"memory_limit={in_gb(limit)}: {need.of(Choice(windows.by, job.execution.batch_size))}, with which the run "
            f"began, need {in_gb(max(need))}. Raise the limit, or start a new run."
        )


def adopt(choice: Choice, job: Job, session: Session) -> tuple[Job, Session]:
    """The run with what was chosen."""
    method, execution = job.method, job.execution
    if choice == Choice(method.windows.by, execution.batch_size):
        return job, session
    training = method.training
    accumulate = training.schedule.accumulate * (execution.batch_size // choice.batch_size)
    trainer, again = (
        partial(make, accumulate_grad_batches=accumulate)
        for make in (training.trainer, training.retraining_trainer or training.trainer)
    )
    schedule = replace(training.schedule, accumulate=accumulate)
    windows = method.windows.of_kind(choice.kind)
    changed = replace(
        method,
        windows=windows,
        training=replace(training, trainer=trainer, retraining_trainer=again, schedule=schedule),
    )
    batching = session.chain.passes.batching
    batching.batch_size = batching.pass_size = choice.batch_size
    if session.retrained:
        session.retrained.data.batching.batch_size = choice.batch_size
    job = replace(job, method=changed, execution=replace(execution, batch_size=choice.batch_size))
    return job, replace(
        session, windows=windows.cut(session.model, session.matrices, skipped=session.allocated.skipped)
    )


def _needs(job: Job, session: Session) -> Iterator[tuple[Choice, _Need]]:
    """All choices in the order of preference, and the memory that each needs."""
    windows = job.method.windows
    kinds: list[str] = [windows.by]
    if windows.by in ORDER and windows.match is None and not windows.skip:  # others have other names
        kinds = [*ORDER[ORDER.index(WindowKind(windows.by)) :]]
    if windows.blocks > len(session.matrices):
        kinds = [kind for kind in kinds if kind != WindowKind.BLOCKS]
    halves: Sequence[AnyWindow] = session.windows
    if WindowKind.HALF in kinds and windows.by != WindowKind.HALF:
        try:
            halves = windows.of_kind(WindowKind.HALF).cut(session.model, session.matrices)
            check_halves(halves, job.method.propagation, recompute=job.execution.store.recompute)
        except ValueError:  # layers that have no halves, or halves that have no logits or no targets
            kinds.remove(WindowKind.HALF)
    plans = {size: plan_job(job, session, size) for size in _batch_sizes(job.execution.batch_size)}
    asked = _array_bytes(job, session, session.windows)
    for kind in kinds:
        for batch_size, plan in plans.items():
            name = name_of(kind, windows.blocks)
            if name in plan.own_by_kind:
                arrays = _array_bytes(job, session, halves if kind == WindowKind.HALF else (), kind)
                on_gpu = job.execution.compute.device.type == "cuda"
                more = arrays.device - asked.device if on_gpu else arrays.memory - asked.memory
                need = _Need(plan.own_by_kind[name] + more, plan.global_fit.own_bytes)
                yield Choice(str(kind), batch_size), need


def _batch_sizes(largest: int) -> Iterator[int]:
    """The batch size and its halves, down to one of which no whole number of smaller batches makes up a step."""
    yield largest
    while largest % 2 == 0:
        largest //= 2
        yield largest


def _array_bytes(job: Job, session: Session, windows: Sequence[AnyWindow], kind: str | None = None) -> Needed:
    """What the chain's arrays take, with these windows."""
    count = num_arrays(job.method, job.execution.store, windows, kind)
    return session.chain.passes.store.needed(session.chain.inputs_STD.shape, count)
