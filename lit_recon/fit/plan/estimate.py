"""Estimate of what a run will take, before any of it is done: bytes and seconds, for windows and a batch size.

Memory is counted, not guessed: what a window's backward keeps is read off one real forward through autograd's own
hooks, and the same forward is timed to tell how long the walk will take.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import psutil
import torch
from lightning import LightningModule
from transformers import PreTrainedModel

from lit_recon.activations.chain import Chain
from lit_recon.activations.store import Needed
from lit_recon.fit.job import Job, Schedule
from lit_recon.fit.plan.global_fit import (
    GlobalFit,
    batches_of,
    describe_global_fit,
    head_bytes,
    plan_global_fit,
    steps_per_window,
)
from lit_recon.fit.plan.layer_profile import LayerProfile, gram_bytes, profile, rows_per_matrix
from lit_recon.fit.session import Session
from lit_recon.model.decoder import examining
from lit_recon.model.matrices import find_matrices, routers
from lit_recon.model.partition import layer_windows
from lit_recon.model.windows import AnyWindow, HalfWindow, Window, WindowKind
from lit_recon.modules.trained import needs_gram
from lit_recon.system.units import duration, in_gb

_BACKWARD = 2.5  # a backward costs about two forwards, masks and optimizer half of one
_FLOAT32 = 4
_MANY_ZEROS = 0.01  # of the weights of a model: it was pruned before, and the plan says so


@dataclass(frozen=True)
class Workload:
    """How much is computed.

    Attributes:
        schedule: How long each window is trained.
        evaluation_tokens: Tokens of one evaluation; three are made.
        needs_gram: Whether single matrices are solved for from normal equations.
        module: Makes the LightningModule that says what is trained; None: all of a window.
        solves_first: Whether matrices are solved for before windows are trained.
        prunes_only: Whether windows are pruned only.
        retraining: How long all layers are trained at once; None: not at all.
    """

    schedule: Schedule
    evaluation_tokens: int
    needs_gram: bool = False
    module: Callable[..., LightningModule] | None = None
    solves_first: bool = False
    prunes_only: bool = False
    retraining: Schedule | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do and what it will take.

    Attributes:
        windows: Number of windows.
        parameters: Parameters of the model.
        prunable: Parameters that the criterion scores.
        unscored: Matrices of the layers that it does not.
        unused: Parameters of two or more dimensions that are no matrices, as a pass has shown.
        routers: Matrices that choose among experts; they stay dense.
        steps: Optimizer steps per window.
        peak_bytes: Predicted peak memory of the run, what is mapped from files included.
        walk_peak_bytes: The same of the walk alone.
        peaks_by_kind: The same for each kind of window.
        own_by_kind: Of the walk, without what is mapped, which goes when memory is short.
        global_fit: What the fit of all layers at once takes.
        mapped_bytes: The dense model's files, all of which an evaluation has mapped.
        disk_bytes: What the output folder takes at most.
        seconds: Predicted time of walk and evaluation.
    """

    windows: int
    parameters: int
    prunable: int
    unscored: int
    unused: int
    routers: int
    steps: int
    peak_bytes: int
    walk_peak_bytes: int
    peaks_by_kind: dict[str, int]
    own_by_kind: dict[str, int]
    global_fit: GlobalFit
    mapped_bytes: int
    disk_bytes: int
    seconds: float


def name_of(kind: str, size: int) -> str:
    """A kind of window as the plan names it."""
    return f"blocks of {size}" if kind == "blocks" else kind


def make_plan(
    session: Session,
    work: Workload,
    *,
    kind: str,
    size: int = 1,
    batch_size: int,
    array_bytes: Needed,
    linked: bool = True,
) -> Plan:
    """Measure one layer of each kind on one batch and extrapolate.

    Args:
        session: The model, cut into windows.
        work: How much is computed.
        kind: What kind of windows they are.
        size: Layers per window, for "blocks".
        batch_size: Samples per batch.
        array_bytes: What the chain's arrays take.
        linked: Whether a commit's file can have a second name in the checkpoint.
    """
    windows, chain, model = session.windows, session.chain, session.model
    layers = layer_windows(model, session.matrices)
    depth, largest = len(layers), max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    files = session.weights.files
    mapped_bytes = files.nbytes if files and chain.passes.compute.device.type != "cuda" else 0
    with examining(model, "its layers cannot be run on one batch of the text"):
        single = _single_bytes(layers, chain, batch_size, array_bytes, uses_gram=work.needs_gram)
        alike = {repr(one): one for one in layers}
        blocks = {name: profile(layer, chain, batch_size, work.module) for name, layer in alike.items()}
    halves = _profiled_halves(windows, model, chain, batch_size, work.module)
    bytes_of_kind = _windows_bytes(blocks.values(), halves, single.memory, largest=largest, size=size, depth=depth)
    if work.solves_first:
        bytes_of_kind = _with_solutions(bytes_of_kind, layers, chain, batch_size, largest)
    pruned_at_once = [sum(one.numel() for one in window.parameters()) for window in session.pruner.pruning_windows]
    scored = max(pruned_at_once, default=0) * _FLOAT32
    evaluation, ends = head_bytes(chain, work.evaluation_tokens, has_loss=windows[-1].head is not None)
    own, shared = _resident(chain, array_bytes)
    mapped_layer = mapped_bytes and largest * model.dtype.itemsize
    peaks, owned = {}, {}
    for name, (masters, training) in bytes_of_kind.items():
        count = max(masters, scored) // (_FLOAT32 * largest)  # layers, of which the dense weights are looked at
        at_once = scored if scored > masters else 0  # several windows, pruned before the first of them is on the device
        training += ends if name != WindowKind.MATRIX else 0
        masters *= 2 if chain.recompute else 1
        peaks[name] = own + shared + masters + max(training, at_once) + mapped_layer * max(1, count)
        owned[name] = own + masters + max(training, at_once, evaluation)
    again = plan_global_fit(
        session,
        [blocks[repr(layer)] for layer in layers],
        work.retraining,
        batch_size=batch_size,
        resident=own - array_bytes.memory,  # hidden states of all samples are gone
        on_logits=head_bytes(chain, work.evaluation_tokens, has_loss=True)[1],
    )
    peaks = {one: max(peak, shared + again.own_bytes + again.mapped_bytes) for one, peak in peaks.items()}
    name = name_of(kind, size)
    evaluated = own + shared + evaluation + mapped_layer * depth  # what is not in layers is looked at already
    forward = sum(blocks[repr(layer)].seconds for layer in layers)
    return Plan(
        windows=session.num_fits,
        **_counts(session),
        steps=steps_per_window(chain.passes.batching.num_samples, batch_size, work.schedule),
        global_fit=again,
        peak_bytes=max(peaks[name], evaluated),
        walk_peak_bytes=peaks[name],
        peaks_by_kind=peaks,
        own_by_kind=owned,
        mapped_bytes=mapped_bytes,
        disk_bytes=_disk_bytes(session, array_bytes, linked=linked)
        + again.disk_bytes
        + (single.disk if kind == WindowKind.MATRIX else 0),
        seconds=_seconds_of_run(forward, layers, chain, work, batch_size, largest, kind, again.samples),
    )


def describe_plan(
    job: Job, plan: Plan, session: Session, protocol: str, *, done: int, steps: int = 0
) -> dict[str, str]:
    """What a run will do and what it takes, as lines by their names.

    Args:
        job: The run.
        plan: Its plan.
        session: Its model, cut into windows.
        protocol: How perplexity is measured.
        done: Windows that are done, of a run that is resumed.
        steps: Steps of the fit of all layers at once that are done.
    """
    samples, compute = job.samples, job.execution.compute
    halves = [window for window in session.windows if isinstance(window, HalfWindow)]
    shared = sorted({name for half in halves for name in half.split.shared})
    zeros = _share_of_zeros(session)
    lines = {
        "model": f"{job.model.describe()}, {plan.parameters / 1e6:.1f} M parameters",
        "prune": f"{plan.prunable * job.method.pattern.sparsity / plan.parameters:.1%} of the parameters: "
        f"{job.method.pattern.describe()} by {job.recipe['criterion']}, in {plan.prunable / plan.parameters:.1%} of "
        + ("them" if not plan.unscored else f"them; {plan.unscored} matrices stay dense")
        + (f"; {plan.unused} parameters that are no matrices stay as they are" if plan.unused else "")
        + (f"; {plan.routers} routers stay dense" if plan.routers else "")
        + (f"; {zeros:.0%} of its weights are zero already and stay zero" if zeros >= _MANY_ZEROS else ""),
        "reconstruct": f"{len(session.windows)} windows ({job.recipe['windows']}), "
        + ("solved exactly, " if needs_gram(job.method.module) else f"{plan.steps} steps each, ")
        + f"on {samples.num_tokens} tokens of {samples.description}"
        + (f"; {', '.join(shared)} of both halves, trained in the attention half" if shared else ""),
        "compute": f"{compute.device.type}, {compute.precision}, masters in float32",
        "evaluate": protocol,
        "predicted": f"about {duration(plan.seconds)}, peak memory {in_gb(plan.peak_bytes)}"
        + (f" (up to {in_gb(plan.mapped_bytes)} of it mapped from the model's files)" if plan.mapped_bytes else "")
        + f", disk {in_gb(plan.disk_bytes)}",
        "by window": ", ".join(f"{name} {in_gb(peak)}" for name, peak in plan.peaks_by_kind.items()),
        "output": str(job.output.folder),
    }
    if job.method.walk == "global":
        lines["reconstruct"] = f"nothing; {len(session.windows)} windows ({job.recipe['windows']}) are pruned"
    if session.retrained:
        lines["retrain"] = describe_global_fit(plan.global_fit, job.method.retraining)
    if job.output.resume:
        lines["resume"] = f"{done} of {plan.windows} windows are done" if done else "no window was done: from the start"
        lines["resume"] += f", and {steps} steps of all layers at once" if steps else ""
    return lines


def _share_of_zeros(session: Session) -> float:
    """Share of the prunable weights that are zero before anything is pruned."""
    weights = [one.weight for layer in session.matrices for one in layer if one.input_dim is not None]
    nonzero = sum(int(torch.count_nonzero(weight != 0)) for weight in weights)
    session.weights.release_pages()
    return 1 - nonzero / max(1, sum(weight.numel() for weight in weights))


def _counts(session: Session) -> dict[str, int]:
    """What there is in the model, as the plan's attributes say."""
    found = [matrix for layer in session.matrices for matrix in layer]
    return {
        "parameters": sum(parameter.numel() for parameter in session.model.parameters()),
        "prunable": sum(matrix.weight.numel() for matrix in found if matrix.input_dim is not None),
        "unused": sum(map(len, find_matrices(session.model))) - len(found),
        "unscored": sum(matrix.input_dim is None for matrix in found),
        "routers": sum(len(routers(layer)) for layer in session.chain.passes.decoder.layers),
    }


def _windows_bytes(
    blocks: Collection[LayerProfile],
    halves: Collection[LayerProfile],
    matrix: int,
    *,
    largest: int,
    size: int,
    depth: int,
) -> dict[str, tuple[int, int]]:
    """Bytes of the float32 weights, and of training, for each kind of window.

    Args:
        blocks: What one batch of a layer of each kind showed.
        halves: The same of their halves, where there are any.
        matrix: Bytes of training a single matrix.
        largest: Parameters of the largest layer.
        size: Layers per window, for "blocks".
        depth: Layers of the model.
    """
    block = max(map(_training_bytes, blocks))
    found: dict[str, tuple[int, int]] = {"matrix": (largest * _FLOAT32, matrix)}
    if halves:
        found["half"] = max(half.parameters for half in halves) * _FLOAT32, max(map(_training_bytes, halves))
    layers = {"block": 1, name_of("blocks", size): size, "model": depth}
    return found | {name: (largest * _FLOAT32 * count, block * count) for name, count in layers.items()}


def _training_bytes(profile: LayerProfile) -> int:
    """Memory of a window besides its weights, and what the backward keeps of a batch."""
    return profile.training_bytes + profile.saved_bytes


def _single_bytes(
    layers: Sequence[Window], chain: Chain, batch_size: int, array_bytes: Needed, *, uses_gram: bool
) -> Needed:
    """What single matrices take at most, in memory and, with the chain's arrays, on the disk."""
    alike = {repr(layer): layer for layer in layers}.values()  # one of each kind
    sizes = [_matrix_bytes(layer, chain, batch_size, uses_gram=uses_gram) for layer in alike]
    memory, captured = (max(one) for one in zip(*sizes, strict=True))
    if not array_bytes.disk:
        return Needed(memory, 0)
    return Needed(memory - captured, captured * chain.passes.store.dtype.itemsize // _FLOAT32)


def _matrix_bytes(layer: Window, chain: Chain, batch_size: int, *, uses_gram: bool) -> tuple[int, int]:
    """What single matrices need: a copy of the layer; inputs and products of one matrix, or all Gram matrices.

    Returns:
        Bytes of it all, and those of inputs and products in them, which may be kept on the disk.
    """
    matrices = {matrix.name: matrix for matrix in layer.matrices() if matrix.input_dim is not None}
    shapes = {name: matrix.by_expert(matrix.weight).shape for name, matrix in matrices.items()}
    copy = sum(shape.numel() for shape in shapes.values())
    leaders, rows = rows_per_matrix(layer, chain, batch_size)
    if uses_gram and chain.propagation.one_source:
        # Of calibration and held-out samples, in float32; those that are solved for once more in float64.
        led = {name: shapes[name] for name in leaders if name in shapes}
        widest = max((inputs for _, _, inputs in shapes.values()), default=0)
        sums = 2 * sum(experts * inputs * inputs for experts, _, inputs in led.values()) + 12 * widest * widest
        return _FLOAT32 * (copy + sums), 0
    sources = 2 if chain.propagation.one_source else 3  # rows, and rows cut into samples
    kept, captured = 0, 0
    for name, (experts, outputs, inputs) in shapes.items():
        mine = rows[name] * (sources * inputs + outputs)
        # Gram matrices: normal equations; else products, optimizer states and gradients.
        aside = 12 * inputs * inputs if uses_gram else rows[name] * outputs + 4 * experts * outputs * inputs
        kept, captured = max(kept, mine + aside), max(captured, mine)
    return _FLOAT32 * (copy + kept), _FLOAT32 * captured


def _with_solutions(
    bytes_of_kind: dict[str, tuple[int, int]], layers: Sequence[Window], chain: Chain, batch_size: int, largest: int
) -> dict[str, tuple[int, int]]:
    """The same where matrices are solved for: Gram matrices and solutions before training, and one more copy in it."""
    sums, aside = gram_bytes(layers, chain, batch_size)
    found = {}
    for kind, (masters, training) in bytes_of_kind.items():
        solving = masters + max(1, masters // (_FLOAT32 * largest)) * sums + aside
        copies = masters * chain.passes.decoder.model.dtype.itemsize // _FLOAT32
        found[kind] = masters, max(training + copies, solving)
    return found


def _profiled_halves(
    windows: Sequence[AnyWindow],
    model: PreTrainedModel,
    chain: Chain,
    batch_size: int,
    module: Callable[..., LightningModule] | None,
) -> list[LayerProfile]:
    """What one batch of the halves of a layer of each kind shows.

    None where windows are others and the halves, which are an estimate only then, cannot be had for whatever reason.
    """
    asked_for = isinstance(windows[0], HalfWindow)
    try:
        cut = windows if asked_for else layer_windows(model, by="half")
        halves = [window for window in cut if isinstance(window, HalfWindow)]
        alike = {(repr(half.layer), half.side): half for half in halves}.values()  # one of each kind
        return [profile(half, chain, batch_size, module) for half in alike]
    except Exception:
        if asked_for:
            raise
        return []


def _seconds_of_run(
    forward: float,
    layers: Sequence[Window],
    chain: Chain,
    work: Workload,
    batch_size: int,
    largest: int,
    kind: str,
    trained_at_once: float,
) -> float:
    """Seconds of walk and evaluation, from those of all layers' forward on a batch."""
    passes = chain.passes
    head = passes.decoder.model.get_output_embeddings().weight.numel() / max(1, largest)
    total, num_samples = len(passes.tokens_ST), passes.batching.num_samples
    trained = 0 if work.prunes_only else batches_of(num_samples, batch_size, work.schedule) * batch_size
    over_all = chain.propagation.passes
    if kind == WindowKind.MATRIX and work.needs_gram and chain.propagation.one_source:
        over_all += not chain.propagation.independent
    elif kind == WindowKind.MATRIX:  # one for each input that matrices have, and for that of its targets if it differs
        inputs = len(rows_per_matrix(layers[0], chain, batch_size)[0])
        over_all += inputs * (1 if chain.propagation.one_source else 2)
    # Errors are measured before, between and after.
    samples = total * over_all + trained * (1 + _BACKWARD) + 7 * passes.num_held_out
    evaluated = trained_at_once + 3 * work.evaluation_tokens / passes.tokens_ST.shape[1]
    # The softmax over the vocabulary in float32 takes twice as long as the product that it follows.
    return forward / batch_size * (samples + evaluated * (1 + 3 * head / len(layers)))


def _resident(chain: Chain, array_bytes: Needed) -> tuple[int, int]:
    """Bytes that this process keeps: its own, with the chain's arrays, and mapped ones; none of either on a GPU."""
    if chain.passes.compute.device.type == "cuda":
        return 0, 0
    memory = psutil.Process().memory_info()
    there, shared = min(array_bytes.memory, chain.inputs_STD.nbytes), getattr(memory, "shared", 0)
    return memory.rss - shared + array_bytes.memory - there, shared


def _disk_bytes(session: Session, array_bytes: Needed, *, linked: bool) -> int:
    """What the output folder takes at most.

    The checkpoint, whose layers are the commits' files under second names, or copies of them; those of a window before
    they take the place of the dense ones, and of the halves before it. Of a model in memory the checkpoint is written
    next to the commits, and next to that of a run that was stopped. Masks; the states of three commits; arrays.
    """
    model, first = session.model, session.windows[0]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    masks = sum(parameter.numel() for parameter in model.parameters()) // 8
    states = sum(array_STD.nbytes for array_STD in session.chain.state().values())
    share = len(first.enclosing.indices) / len(session.matrices) * (2 if isinstance(first, HalfWindow) else 1)
    copies = (1 if linked else 2) if session.weights.files else 3
    return int(weights * (copies + share)) + 2 * masks + 3 * states + array_bytes.disk
