"""A limit of memory chooses what is done at once: the paper's finding that quality hardly depends on a window's size.

A smaller batch comes first, with as many more batches per optimizer step, which changes nothing but the time; then the
next smaller kind of window. Single matrices are worse, so they are never chosen. What is mapped from the dense model's
files does not count: the system takes it back when it needs the room.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from accelerate.utils import convert_file_size_to_int

from lit_recon.activations.disk_store import nearest
from lit_recon.activations.store import Needed
from lit_recon.activations.teacher import check_halves
from lit_recon.fit.job import Job, Loaded
from lit_recon.fit.plan.estimate import Plan, make_plan, name_of
from lit_recon.model.windows import AnyWindow
from lit_recon.system.atomic_files import can_link
from lit_recon.system.units import in_gb

_SLACK = 1.05  # what a process has of its own is measured, and it was another process that chose
ORDER = ("model", "blocks", "block", "half")  # from large to small


def parse_limit(limit: str | int) -> int:
    """Bytes of a limit such as "6GiB", "500MB" or a number.

    Raises:
        ValueError: It is none of these.
    """
    try:
        size = int(convert_file_size_to_int(limit))
    except ValueError:
        size = 0
    if size <= 0:
        raise ValueError(f"memory_limit={limit}: expected a size such as 6GiB, 500MB, or a number of bytes.")
    return size


@dataclass(frozen=True)
class Choice:
    """What is done at once.

    Attributes:
        kind: Kind of windows.
        batch_size: Samples per batch.
    """

    kind: str
    batch_size: int


def plan_of(job: Job, loaded: Loaded) -> Plan:
    """The plan of a run as it is."""
    return make_plan(
        loaded.windows,
        loaded.chain,
        job.workload,
        units=loaded.units,
        kind=job.windows.by,
        size=job.windows.blocks,
        array_bytes=loaded.array_bytes,
        mapped_bytes=loaded.checkpoint.files.nbytes if loaded.checkpoint.files else 0,
        linked=can_link(nearest(job.output)),
    )


def choose(job: Job, loaded: Loaded) -> Choice:
    """The largest batch of the largest windows, up to those that were asked for, that fit into the limit.

    Raises:
        ValueError: Nothing fits; the message has the numbers.
    """
    assert job.memory_limit is not None
    needs = {choice: need for choice, need in _needs(job, loaded)}
    for choice, need in needs.items():
        if need <= job.memory_limit:
            return choice
    smallest = min(needs, key=lambda choice: needs[choice])
    raise ValueError(
        f"memory_limit={in_gb(job.memory_limit)}: even windows={smallest.kind} with data.batch_size="
        f"{smallest.batch_size} need {in_gb(needs[smallest])}, as asked for it would be "
        f"{in_gb(needs[next(iter(needs))])}. Raise the limit, or use shorter or fewer samples (data.length, "
        "data.num_samples), store=disk, or store.targets=recompute."
    )


def check_limit(plan: Plan, job: Job) -> None:
    """Check that a run as it is fits into its limit: what one began with is not chosen again when it is taken up.

    Raises:
        ValueError: It does not; the message has the numbers.
    """
    assert job.memory_limit is not None
    need = plan.own_by_kind[name_of(job.windows.by, job.windows.blocks)]
    if need > _SLACK * job.memory_limit:
        raise ValueError(
            f"memory_limit={in_gb(job.memory_limit)}: windows={job.windows.by} with data.batch_size={job.batch_size}, "
            f"with which the run began, need {in_gb(need)}. Raise the limit, or start a new run."
        )


def _needs(job: Job, loaded: Loaded) -> Iterator[tuple[Choice, int]]:
    """All choices in the order of preference, and the memory that each needs."""
    kinds = list(ORDER[ORDER.index(job.windows.by) :]) if job.windows.by in ORDER else [job.windows.by]
    if job.windows.blocks > len(loaded.chain.decoder.layers):
        kinds = [kind for kind in kinds if kind != "blocks"]
    halves = loaded.windows
    if "half" in kinds and job.windows.by != "half":
        try:
            halves = job.windows.of_kind("half").cut(loaded.model)
            check_halves(halves, job.regime, recompute=job.store.recompute)
        except ValueError:  # layers that have no halves, or halves that have no logits or no targets
            kinds.remove("half")
    batch_size, plans = job.batch_size, {}
    while True:
        loaded.chain.batch_size = batch_size
        plans[batch_size] = plan_of(job, loaded)
        if batch_size % 2:  # then no whole number of smaller batches makes up a step
            break
        batch_size //= 2
    loaded.chain.batch_size = job.batch_size
    for kind in kinds:
        for batch_size, plan in plans.items():
            name = name_of(kind, job.windows.blocks)
            if name in plan.own_by_kind:
                on_gpu = job.compute.device.type == "cuda"  # whose memory the arrays take none of
                arrays = _array_bytes(kind, halves if kind == "half" else (), job, loaded)
                more = 0 if on_gpu else arrays.memory - loaded.array_bytes.memory
                yield Choice(kind, batch_size), plan.own_by_kind[name] + more


def _array_bytes(kind: str, windows: Sequence[AnyWindow], job: Job, loaded: Loaded) -> Needed:
    """What the chain's arrays take with other windows."""
    return Needed(*(size // loaded.num_arrays * job.num_arrays(kind, windows) for size in loaded.array_bytes))


def adopt(choice: Choice, job: Job, loaded: Loaded) -> tuple[Job, Loaded]:
    """The run with what was chosen."""
    if choice == Choice(job.windows.by, job.batch_size):
        return job, loaded
    accumulate = job.workload.accumulate * (job.batch_size // choice.batch_size)
    partition = job.windows.of_kind(choice.kind)
    windows = partition.cut(loaded.model)
    described = {"windows": partition.describe(), "batch_size": f"{choice.batch_size}, {accumulate} per step"}
    changed = replace(
        job,
        windows=partition,
        batch_size=choice.batch_size,
        trainer=partial(job.trainer, accumulate_grad_batches=accumulate),
        workload=replace(job.workload, accumulate=accumulate),
        recipe=job.recipe | described,
    )
    loaded.chain.batch_size = choice.batch_size
    num_arrays, array_bytes = job.num_arrays(choice.kind, windows), _array_bytes(choice.kind, windows, job, loaded)
    return changed, replace(loaded, windows=windows, num_arrays=num_arrays, array_bytes=array_bytes)
