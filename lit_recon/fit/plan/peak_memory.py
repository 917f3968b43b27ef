"""Peak memory of a run by the kind of its windows, from what one batch of its layers showed.

    what all runs take (the process, the chain's arrays, an evaluation) + weights of a window + its training

and the fit of all layers at once after it. What is mapped from the dense model's files is told apart: it goes when
memory is short.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import psutil

from lit_recon.activations.chain import Chain
from lit_recon.activations.store import Needed
from lit_recon.fit.plan.global_fit import GlobalFit, head_bytes
from lit_recon.fit.plan.layer_profile import LayerProfile, gram_bytes, rows_per_matrix
from lit_recon.fit.session import Session
from lit_recon.model.windows import Window, WindowKind

_FLOAT32 = 4


def name_of(kind: str, size: int) -> str:
    """A kind of window as the plan names it."""
    return f"blocks of {size}" if kind == "blocks" else kind


@dataclass(frozen=True, kw_only=True)
class CommonBytes:
    """Memory that a run takes whichever kind of windows it walks over.

    Attributes:
        layer: The largest layer in float32.
        own: The process with the chain's arrays.
        arrays: Those arrays.
        shared: What is mapped by now.
        mapped: The dense model's files.
        mapped_layer: The largest layer among these.
        scored: Weights in float32 of what is pruned at once.
        on_logits: A loss on the logits of the last window.
        evaluation: An evaluation, besides what it has mapped.
    """

    layer: int
    own: int
    arrays: int
    shared: int
    mapped: int
    mapped_layer: int
    scored: int
    on_logits: int
    evaluation: int

    def evaluated(self, depth: int) -> int:
        """The peak of an evaluation of so many layers; what is not in layers is looked at already."""
        return self.own + self.shared + self.evaluation + self.mapped_layer * depth


def common_bytes(session: Session, evaluation_tokens: int, array_bytes: Needed, largest: int) -> CommonBytes:
    """Memory that a run takes whichever kind of windows it walks over; of the largest layer's parameters."""
    chain, files = session.chain, session.weights.files
    mapped = files.nbytes if files and chain.passes.compute.device.type != "cuda" else 0
    pruned_at_once = [sum(one.numel() for one in window.parameters()) for window in session.pruner.pruning_windows]
    evaluation, on_logits = head_bytes(chain, evaluation_tokens, has_loss=session.windows[-1].head is not None)
    own, shared = _resident(chain, array_bytes)
    return CommonBytes(
        layer=largest * _FLOAT32,
        own=own,
        arrays=array_bytes.device if _is_on_gpu(chain) else array_bytes.memory,
        shared=shared,
        mapped=mapped,
        mapped_layer=mapped and largest * session.model.dtype.itemsize,
        scored=max(pruned_at_once, default=0) * _FLOAT32,
        on_logits=on_logits,
        evaluation=evaluation,
    )


def peaks_of(
    bytes_of_kind: Mapping[str, tuple[int, int]], common: CommonBytes, again: GlobalFit, *, copies: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Peak memory of a run by the kind of its windows, with what it has mapped; and of its walk alone, without.

    Args:
        bytes_of_kind: Bytes of the weights, and of training, for each kind.
        common: What they have in common.
        again: The fit of all layers at once.
        copies: Of the weights of a window: of a dense one that makes its targets anew as well.
    """
    peaks, owned = {}, {}
    for name, (masters, training) in bytes_of_kind.items():
        scored = common.scored
        count = max(masters, scored) // common.layer  # layers, of which the dense weights are looked at
        at_once = scored if scored > masters else 0  # several windows, pruned before the first of them is on the device
        training += common.on_logits if name != WindowKind.MATRIX else 0
        walk = common.own + masters * copies + max(training, at_once)
        peaks[name] = max(
            walk + common.shared + common.mapped_layer * max(1, count),
            common.shared + again.own_bytes + again.mapped_bytes,
        )
        owned[name] = max(walk, common.own + masters * copies + common.evaluation)
    return peaks, owned


def windows_bytes(
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
        blocks: What one batch of each layer showed.
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


def single_bytes(
    layers: Sequence[Window],
    chain: Chain,
    batch_size: int,
    array_bytes: Needed,
    *,
    uses_gram: bool,
    copies: int = 0,
) -> Needed:
    """What single matrices take at most, in memory and, with the chain's arrays, on the disk.

    Args:
        layers: The layers.
        chain: Their chain.
        batch_size: Samples per batch.
        array_bytes: What the chain's arrays take.
        uses_gram: Whether matrices are solved for.
        copies: Copies in float32 that a fit holds of a matrix.
    """
    alike = {repr(layer): layer for layer in layers}.values()  # one of each kind
    sizes = [_matrix_bytes(layer, chain, batch_size, uses_gram=uses_gram, copies=copies) for layer in alike]
    memory, captured = (max(one) for one in zip(*sizes, strict=True))
    if not array_bytes.disk and (array_bytes.device or not _is_on_gpu(chain)):
        return Needed(memory, 0)  # where windows are trained
    stored = captured * chain.passes.store.dtype.itemsize // _FLOAT32
    return Needed(memory - captured, stored if array_bytes.disk else 0)


def _matrix_bytes(layer: Window, chain: Chain, batch_size: int, *, uses_gram: bool, copies: int) -> tuple[int, int]:
    """What single matrices need: a copy of the layer; inputs and products of one matrix, or all Gram matrices.

    Returns:
        Bytes of it all, and those of inputs and products in them, which may be kept on the disk.
    """
    matrices = {matrix.name: matrix for matrix in layer.matrices() if matrix.input_dim is not None}
    shapes = {name: matrix.by_expert(matrix.weight).shape for name, matrix in matrices.items()}
    copy = sum(shape.numel() for shape in shapes.values())
    leaders, rows = rows_per_matrix(layer, chain, batch_size)
    if uses_gram:
        # Of calibration and held-out samples, in float32; those that are solved for once more in float64.
        each = 2 if chain.propagation.one_source else 6  # where targets have other inputs: theirs, and of both
        at_once = sum if chain.propagation.inputs == "dense" else max  # else of one input after the other
        led = {name: shapes[name] for name in leaders if name in shapes}
        widest = max((inputs for _, _, inputs in shapes.values()), default=0)
        sums = each * at_once(experts * inputs * inputs for experts, _, inputs in led.values()) + 12 * widest * widest
        return _FLOAT32 * (copy + sums), 0
    sources = 2 if chain.propagation.one_source else 3  # rows, and rows cut into samples
    kept, captured = 0, 0
    for name, (experts, outputs, inputs) in shapes.items():
        mine = rows[name] * (sources * inputs + outputs)
        # Products, optimizer states, gradients and copies.
        trained = rows[name] * outputs + (4 + copies) * experts * outputs * inputs
        kept, captured = max(kept, mine + trained), max(captured, mine)
    return _FLOAT32 * (copy + kept), _FLOAT32 * captured


def with_grams(
    bytes_of_kind: dict[str, tuple[int, int]],
    layers: Sequence[Window],
    chain: Chain,
    batch_size: int,
    *,
    updates: bool,
) -> dict[str, tuple[int, int]]:
    """The same where Gram matrices are needed to prune: those of one layer at a time, before anything is trained.

    Args:
        bytes_of_kind: Bytes of the weights, and of training, for each kind.
        layers: The layers.
        chain: Its samples.
        batch_size: Samples per batch.
        updates: Whether new weights for the whole window are made from them.
    """
    sums, aside = gram_bytes(layers, chain, batch_size)
    states = chain.inputs_STD.nbytes  # a window of several layers is looked at in a pass of its own
    found = {}
    for kind, (masters, training) in bytes_of_kind.items():
        copies = masters if updates else 0
        more = states if kind not in (WindowKind.MATRIX, WindowKind.HALF, WindowKind.BLOCK) else 0
        found[kind] = masters, max(training, sums + aside + copies + more)
    return found


def with_solutions(
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


def _resident(chain: Chain, array_bytes: Needed) -> tuple[int, int]:
    """Bytes that this process keeps: its own, with the chain's arrays, and mapped ones; of a GPU the arrays alone."""
    if _is_on_gpu(chain):
        return array_bytes.device, 0
    memory = psutil.Process().memory_info()
    there, shared = min(array_bytes.memory, chain.inputs_STD.nbytes), getattr(memory, "shared", 0)
    return memory.rss - shared + array_bytes.memory - there, shared


def _is_on_gpu(chain: Chain) -> bool:
    """Whether windows are trained in other memory than that of the CPU."""
    return chain.passes.compute.device.type == "cuda"


def host_bytes(session: Session, array_bytes: Needed, window_parameters: int) -> int | None:
    """Peak of the CPU's memory in a walk on a GPU, what is mapped included; None where windows are trained in it.

    Of a window in the model's own dtype: what is looked at and what is read ahead in the model's files, the latter
    pinned as well, and the weights that go back.

    Args:
        session: The model.
        array_bytes: What the chain's arrays take.
        window_parameters: Of the largest window.
    """
    chain = session.chain
    if not _is_on_gpu(chain):
        return None
    there = min(array_bytes.memory, chain.inputs_STD.nbytes)
    weights = 4 * window_parameters * session.model.dtype.itemsize
    return psutil.Process().memory_info().rss - there + array_bytes.memory + weights
