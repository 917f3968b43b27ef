"""Estimate of what a run will take, before any of it is done: bytes and seconds, for windows and a batch size.

Memory is counted, not guessed: what a window's backward keeps is read off one real forward through autograd's own
hooks, and the same forward is timed to tell how long the walk will take.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

from lightning import LightningModule
from transformers import PreTrainedModel

from lit_recon.activations.chain import Chain
from lit_recon.activations.store import Needed
from lit_recon.fit.job import Schedule
from lit_recon.fit.plan.global_fit import GlobalFit, batches_of, head_bytes, plan_global_fit, steps_per_window
from lit_recon.fit.plan.layer_profile import LayerProfile, profile, rows_per_matrix
from lit_recon.fit.plan.peak_memory import (
    common_bytes,
    host_bytes,
    name_of,
    peaks_of,
    single_bytes,
    windows_bytes,
    with_grams,
    with_solutions,
)
from lit_recon.fit.session import Session
from lit_recon.model.decoder import examining
from lit_recon.model.matrices import find_matrices, routers
from lit_recon.model.partition import layer_windows
from lit_recon.model.windows import AnyWindow, HalfWindow, Window, WindowKind

_BACKWARD = 2.5  # a backward costs about two forwards, masks and optimizer half of one
_GRAM = 0.1  # Gram matrices and what is solved from them, about a dense pass or two of all that a run computes
_AS_FAR = 0.5  # of a layer, on average, which is run no further than to its q, o, gate or down
_FLOAT32 = 4


@dataclass(frozen=True)
class Workload:
    """How much is computed.

    Attributes:
        schedule: How long each window is trained.
        evaluation_tokens: Tokens of one evaluation.
        needs_gram: Whether single matrices are solved for from normal equations.
        module: Makes the LightningModule that says what is trained; None: all of a window.
        solves_first: Whether matrices are solved for before windows are trained.
        prunes_only: Whether windows are pruned only.
        retraining: How long all layers are trained at once; None: not at all.
        keeps_best: Whether the best state of a fit is kept.
        is_anchored: Whether what is trained is pulled towards its start.
        evaluations: How many evaluations are made.
    """

    schedule: Schedule
    evaluation_tokens: int
    _: KW_ONLY
    needs_gram: bool = False
    module: Callable[..., LightningModule] | None = None
    solves_first: bool = False
    prunes_only: bool = False
    retraining: Schedule | None = None
    keeps_best: bool = False
    is_anchored: bool = False
    evaluations: int = 3

    @property
    def copies(self) -> int:
        """Copies in float32 that a fit holds of what is trained: the best state, an anchor's start and its distance."""
        return self.keeps_best + 2 * self.is_anchored


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
        host_bytes: Predicted peak of the CPU's memory in the walk, of one on a GPU, whose memory the others are.
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
    host_bytes: int | None = None


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
    chain, layers = session.chain, layer_windows(session.model, session.matrices)
    depth, largest = len(layers), max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    with examining(session.model, "its layers cannot be run on one batch of the text"):
        single = single_bytes(layers, chain, batch_size, array_bytes, uses_gram=work.needs_gram, copies=work.copies)
        alike = {repr(one): one for one in layers}
        profiles = {name: _profiled(layer, chain, batch_size, work) for name, layer in alike.items()}
    blocks = [profiles[repr(layer)] for layer in layers]
    halves = _profiled_halves(session.windows, session.model, chain, batch_size, work)
    bytes_of_kind = windows_bytes(blocks, halves, single.memory, largest=largest, size=size, depth=depth)
    bytes_of_kind = _with_products(bytes_of_kind, session, work, layers, batch_size, largest)
    common = common_bytes(session, work.evaluation_tokens, array_bytes, largest)
    again = plan_global_fit(
        session,
        blocks,
        work.retraining,
        batch_size=batch_size,
        resident=common.own - common.arrays,  # hidden states of all samples are gone
        on_logits=head_bytes(chain, work.evaluation_tokens, has_loss=True)[1],
    )
    peaks, owned = peaks_of(bytes_of_kind, common, again, copies=2 if chain.recompute else 1)
    name = name_of(kind, size)
    window = largest * {"blocks": size, "model": depth}.get(kind, 1)
    disk_bytes = _disk_bytes(session, array_bytes, linked=linked) + again.disk_bytes
    return Plan(
        windows=session.num_fits,
        **_counts(session),
        steps=steps_per_window(chain.passes.batching.num_samples, batch_size, work.schedule),
        global_fit=again,
        peak_bytes=max(peaks[name], common.evaluated(depth)),
        walk_peak_bytes=peaks[name],
        peaks_by_kind=peaks,
        own_by_kind=owned,
        mapped_bytes=common.mapped,
        disk_bytes=disk_bytes + (single.disk if kind == WindowKind.MATRIX else 0),
        host_bytes=host_bytes(session, array_bytes, window),
        seconds=_seconds_of_run(session, blocks, layers, work, batch_size=batch_size, kind=kind, at_once=again.samples),
    )


def _with_products(
    bytes_of_kind: dict[str, tuple[int, int]],
    session: Session,
    work: Workload,
    layers: Sequence[Window],
    batch_size: int,
    largest: int,
) -> dict[str, tuple[int, int]]:
    """Bytes by kind of window with what Gram matrices take, and what is made of them."""
    pruner, chain = session.pruner, session.chain
    if pruner.needs_gram:
        bytes_of_kind = with_grams(bytes_of_kind, layers, chain, batch_size, updates=pruner.updates)
    if work.solves_first:
        bytes_of_kind = with_solutions(bytes_of_kind, layers, chain, batch_size, largest)
    return bytes_of_kind


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


def _profiled(window: Window, chain: Chain, batch_size: int, work: Workload) -> LayerProfile:
    """What one batch of a window shows, and what its fit keeps."""
    found = profile(window, chain, batch_size, work.module)
    return replace(found, keeps_best=work.keeps_best, is_anchored=work.is_anchored)


def _profiled_halves(
    windows: Sequence[AnyWindow], model: PreTrainedModel, chain: Chain, batch_size: int, work: Workload
) -> list[LayerProfile]:
    """What one batch of the halves of a layer of each kind shows.

    None where windows are others and the halves, which are an estimate only then, cannot be had for whatever reason.
    """
    asked_for = isinstance(windows[0], HalfWindow)
    try:
        cut = windows if asked_for else layer_windows(model, by="half")
        halves = [window for window in cut if isinstance(window, HalfWindow)]
        alike = {(repr(half.layer), half.side): half for half in halves}.values()  # one of each kind
        return [_profiled(half, chain, batch_size, work) for half in alike]
    except Exception:
        if asked_for:
            raise
        return []


def _seconds_of_run(
    session: Session,
    blocks: Sequence[LayerProfile],
    layers: Sequence[Window],
    work: Workload,
    *,
    batch_size: int,
    kind: str,
    at_once: float,
) -> float:
    """Seconds of walk and evaluation, from those of all layers' forward on a batch.

    Args:
        session: The model, cut into windows.
        blocks: What one batch of each layer showed.
        layers: The layers.
        work: How much is computed.
        batch_size: Samples per batch.
        kind: What kind of windows they are.
        at_once: Samples over which all layers are run at once.
    """
    chain, passes = session.chain, session.chain.passes
    forward = sum(block.seconds for block in blocks) * (1 + session.pruner.needs_gram * _GRAM)
    head = session.model.get_output_embeddings().weight.numel() / max(1, max(block.parameters for block in blocks))
    total, num_samples = len(passes.tokens_ST), passes.batching.num_samples
    trained = 0.0 if work.prunes_only else float(batches_of(num_samples, batch_size, work.schedule) * batch_size)
    chosen = sum(window.is_chosen for window in session.windows) / max(1, len(session.windows))
    over_all = float(chain.propagation.passes)
    if kind == WindowKind.MATRIX and work.needs_gram and chain.propagation.inputs == "dense":
        over_all += not chain.propagation.independent
    elif kind == WindowKind.MATRIX:  # one for each input that matrices have, and for that of its targets if it differs
        inputs = len(rows_per_matrix(layers[0], chain, batch_size)[0])
        over_all += _AS_FAR * inputs * (1 if chain.propagation.one_source else 2)
    # Errors are measured before, between and after; before and after also on as many calibration samples.
    samples = total * over_all + chosen * (trained * (1 + _BACKWARD) + 5 * passes.num_held_out)
    evaluated = at_once + work.evaluations * work.evaluation_tokens / passes.tokens_ST.shape[1]
    # The softmax over the vocabulary in float32 takes twice as long as the product that it follows.
    return forward / batch_size * (samples + evaluated * (1 + 3 * head / len(layers)))


def _disk_bytes(session: Session, array_bytes: Needed, *, linked: bool) -> int:
    """What the output folder takes at most.

    The checkpoint, whose layers are the commits' files under second names, or copies of them; those of a window before
    they take the place of the dense ones, and of the halves before it. Of a model in memory the checkpoint is written
    next to the commits, and next to that of a run that was stopped. Masks; the states of three commits; arrays.
    """
    model, first = session.model, session.windows[0]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    masks = sum(parameter.numel() for parameter in model.parameters()) // 8
    is_committed = not session.chain.propagation.independent
    states = sum(array_STD.nbytes for array_STD in session.chain.state().values()) if is_committed else 0
    share = len(first.enclosing.indices) / len(session.matrices) * (2 if isinstance(first, HalfWindow) else 1)
    copies = (1 if linked else 2) if session.weights.files else 3
    pruned = weights if session.pruner.updates else 0  # as the criterion leaves them
    return int(weights * (copies + share)) + pruned + 2 * masks + 3 * states + array_bytes.disk
