"""The plan of a run: what will be pruned and reconstructed, and what it will take, before any of it is done.

Memory is counted, not guessed: what a window's backward keeps is read off one real forward through autograd's own
hooks, and the same forward is timed to tell how long the walk will take.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import psutil
from transformers import PreTrainedModel

from lit_recon.activations.chain import Chain
from lit_recon.activations.store import Needed
from lit_recon.evaluate.perplexity import LOGITS_BYTES
from lit_recon.fit.plan.layer_profile import Probe, observe, probe
from lit_recon.model.matrices import routers
from lit_recon.model.partition import layer_windows
from lit_recon.model.windows import AnyWindow, HalfWindow, Window
from lit_recon.modules.losses import SLICE

_BACKWARD = 2.5  # a backward costs about two forwards, masks and optimizer half of one
_FLOAT32 = 4


@dataclass(frozen=True)
class Workload:
    """How often each window is run.

    Attributes:
        epochs: Passes over the calibration samples.
        max_steps: Bound on optimizer steps; -1 for none.
        accumulate: Batches per optimizer step.
        evaluation_tokens: Tokens of one evaluation; three are made.
        uses_moments: Whether matrices are solved for from moments.
    """

    epochs: int
    max_steps: int
    accumulate: int
    evaluation_tokens: int
    uses_moments: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run will do and what it will take.

    Attributes:
        windows: Number of windows.
        parameters: Parameters of the model.
        prunable: Parameters that the criterion scores.
        unscored: Matrices of the layers that it does not.
        routers: Matrices that choose among experts; they stay dense.
        steps: Optimizer steps per window.
        peak_bytes: Predicted peak memory of the run, what is mapped from files included.
        walk_peak_bytes: The same of the walk alone.
        peaks_by_kind: The same for each kind of window.
        own_by_kind: Of the run, without what is mapped, which goes when memory is short.
        mapped_bytes: The dense model's files, all of which an evaluation has mapped.
        disk_bytes: What the output folder takes at most.
        seconds: Predicted time of walk and evaluation.
    """

    windows: int
    parameters: int
    prunable: int
    unscored: int
    routers: int
    steps: int
    peak_bytes: int
    walk_peak_bytes: int
    peaks_by_kind: dict[str, int]
    own_by_kind: dict[str, int]
    mapped_bytes: int
    disk_bytes: int
    seconds: float


def name_of(kind: str, size: int) -> str:
    """A kind of window as the plan names it."""
    return f"blocks of {size}" if kind == "blocks" else kind


def steps_per_window(chain: Chain, work: Workload) -> int:
    """Optimizer steps of each window."""
    batches = -(-chain.num_samples // chain.batch_size)
    steps = work.epochs * -(-batches // work.accumulate) if work.epochs > 0 else work.max_steps
    return steps if work.max_steps < 0 else min(steps, work.max_steps)


def make_plan(
    windows: Sequence[AnyWindow],
    chain: Chain,
    work: Workload,
    *,
    units: Sequence[Window] = (),
    kind: str,
    size: int = 1,
    array_bytes: Needed,
    mapped_bytes: int,
    linked: bool = True,
) -> Plan:
    """Measure one layer of each kind on one batch and extrapolate.

    Args:
        windows: All windows, with the model's weights.
        chain: The chain at the first window.
        work: How often each of them will be run.
        units: What is pruned at once, where that is not a window.
        kind: What kind of windows they are.
        size: Layers per window, for "blocks".
        array_bytes: What the chain's arrays take.
        mapped_bytes: What is mapped of the model's files.
        linked: Whether a commit's file can have a second name in the checkpoint.
    """
    model, depth = chain.decoder.model, len(chain.decoder.layers)
    layers = layer_windows(model)
    largest = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    in_memory, mapped_bytes = not mapped_bytes, 0 if chain.compute.device.type == "cuda" else mapped_bytes
    single = _single_bytes(layers, chain, array_bytes, uses_moments=work.uses_moments)
    blocks = {name: probe(layer, chain) for name, layer in {repr(layer): layer for layer in layers}.items()}
    halves = [probe(half, chain) for half in _halves_of(windows, model)]
    bytes_of_kind = _windows_bytes(blocks.values(), halves, single.memory, largest=largest, size=size, depth=depth)
    scored = max((sum(parameter.numel() for parameter in unit.parameters()) for unit in units), default=0) * _FLOAT32
    evaluation, ends = _head_bytes(chain, work, has_loss=windows[-1].head is not None)
    own, shared = _resident(chain, array_bytes)
    mapped_layer = mapped_bytes and largest * model.dtype.itemsize
    peaks, owned = {}, {}
    for name, (masters, training) in bytes_of_kind.items():
        count = max(masters, scored) // (_FLOAT32 * largest)  # layers, of which the dense weights are looked at
        at_once = scored if scored > masters else 0  # a unit of several windows, pruned before they are brought in
        training += ends if name != "matrix" else 0
        masters *= 2 if chain.recompute else 1
        peaks[name] = own + shared + masters + max(training, at_once) + mapped_layer * max(1, count)
        owned[name] = own + masters + max(training, at_once, evaluation)
    name = name_of(kind, size)
    evaluated = own + shared + evaluation + mapped_layer * depth  # what is not in layers is looked at already
    return Plan(
        windows=len(windows),
        **_counts(chain),
        steps=steps_per_window(chain, work),
        peak_bytes=max(peaks[name], evaluated),
        walk_peak_bytes=peaks[name],
        peaks_by_kind=peaks,
        own_by_kind=owned,
        mapped_bytes=mapped_bytes,
        disk_bytes=_disk_bytes(windows, chain, array_bytes, in_memory=in_memory, linked=linked)
        + (single.disk if kind == "matrix" else 0),
        seconds=_seconds_of_run(sum(blocks[repr(layer)].seconds for layer in layers), chain, work, largest, kind),
    )


def _counts(chain: Chain) -> dict[str, int]:
    """What there is in the model, as the plan's attributes say."""
    model = chain.decoder.model
    found = [matrix for layer in layer_windows(model) for matrix in layer.matrices()]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "prunable": sum(matrix.weight.numel() for matrix in found if matrix.input_dim is not None),
        "unscored": sum(matrix.input_dim is None for matrix in found),
        "routers": sum(len(routers(layer)) for layer in chain.decoder.layers),
    }


def _head_bytes(chain: Chain, work: Workload, *, has_loss: bool) -> tuple[int, int]:
    """What an evaluation takes, and a loss on the logits where there is one."""
    weight = chain.decoder.model.get_output_embeddings().weight
    copied = 2 * weight.numel()  # by autocast, in 16 bits
    states = chain.inputs_STD[0, 0].numel() * work.evaluation_tokens * _FLOAT32
    evaluation = 4 * LOGITS_BYTES + copied + states  # logits, their softmax and two copies on the way
    return evaluation, (copied + 8 * SLICE * len(weight) * _FLOAT32) if has_loss else 0  # two slices, with gradients


def _windows_bytes(
    blocks: Collection[Probe], halves: Collection[Probe], matrix: int, *, largest: int, size: int, depth: int
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
    found = {"matrix": (largest * _FLOAT32, matrix)}
    if halves:
        found["half"] = max(half.parameters for half in halves) * _FLOAT32, max(map(_training_bytes, halves))
    layers = {"block": 1, name_of("blocks", size): size, "model": depth}
    return found | {name: (largest * _FLOAT32 * count, block * count) for name, count in layers.items()}


def _training_bytes(probe: Probe) -> int:
    """What is there for a window beside its weights, and what the backward keeps of a batch.

    Per parameter in float32 a gradient, two moments, and the mask that gradients are multiplied by; the pruned weight
    to go back to; the boolean mask. Autocast's copies in 16 bits are among what the backward keeps.
    """
    return probe.parameters * (4 * _FLOAT32 + probe.weight_bytes + 1) + probe.saved_bytes


def _single_bytes(layers: Sequence[Window], chain: Chain, array_bytes: Needed, *, uses_moments: bool) -> Needed:
    """What single matrices take at most, in memory and, with the chain's arrays, on the disk."""
    alike = {repr(layer): layer for layer in layers}.values()  # one of each kind
    sizes = [_matrix_bytes(layer, chain, uses_moments=uses_moments) for layer in alike]
    memory, captured = (max(one) for one in zip(*sizes, strict=True))
    if not array_bytes.disk:
        return Needed(memory, 0)
    return Needed(memory - captured, captured * chain.store.dtype.itemsize // _FLOAT32)


def _matrix_bytes(layer: Window, chain: Chain, *, uses_moments: bool) -> tuple[int, int]:
    """What is there for single matrices: a copy of the layer; inputs and products of one matrix, or all moments.

    Returns:
        Bytes of it all, and those of inputs and products in them, which may be kept on the disk.
    """
    matrices = {matrix.name: matrix for matrix in layer.matrices() if matrix.input_dim is not None}
    shapes = {name: matrix.by_expert(matrix.weight).shape for name, matrix in matrices.items()}
    copy = sum(shape.numel() for shape in shapes.values())
    leaders, rows = observe(layer, chain)
    if (
        uses_moments and chain.regime.one_source
    ):  # of calibration and held-out, in float32; those in work once more in float64
        led = {name: shapes[name] for name in leaders if name in shapes}
        widest = max((inputs for _, _, inputs in shapes.values()), default=0)
        sums = 2 * sum(experts * inputs * inputs for experts, _, inputs in led.values()) + 12 * widest * widest
        return _FLOAT32 * (copy + sums), 0
    sources = 2 if chain.regime.one_source else 3  # rows, and rows cut into samples
    kept, captured = 0, 0
    for name, (experts, outputs, inputs) in shapes.items():
        mine = rows[name] * (sources * inputs + outputs)
        # Moments: targets in float64, and normal equations; else products, optimizer states and gradients.
        aside = 2 * rows[name] * outputs + 12 * inputs * inputs if uses_moments else rows[name] * outputs
        aside += 0 if uses_moments else 4 * experts * outputs * inputs
        kept, captured = max(kept, mine + aside), max(captured, mine)
    return _FLOAT32 * (copy + kept), _FLOAT32 * captured


def _halves_of(windows: Sequence[AnyWindow], model: PreTrainedModel) -> list[HalfWindow]:
    """The halves of one layer of each kind, also where windows are others; none where there are none."""
    if not isinstance(windows[0], HalfWindow):
        try:
            windows = layer_windows(model, by="half")
        except ValueError:
            return []
    halves = [window for window in windows if isinstance(window, HalfWindow)]
    return list({(repr(half.layer), half.side): half for half in halves}.values())


def _seconds_of_run(forward: float, chain: Chain, work: Workload, largest: int, kind: str) -> float:
    """Seconds of walk and evaluation, from those of all layers' forward on a batch."""
    head = chain.decoder.model.get_output_embeddings().weight.numel() / max(1, largest)
    depth, total, held_out = len(chain.decoder.layers), len(chain.tokens_ST), chain.num_held_out
    trained = steps_per_window(chain, work) * work.accumulate * chain.batch_size
    over_all = chain.regime.passes
    if kind == "matrix" and work.uses_moments and chain.regime.one_source:
        over_all += not chain.regime.independent
    elif kind == "matrix":  # one for each input that matrices have, and for that of its targets where it is another
        inputs = len(observe(layer_windows(chain.decoder.model)[0], chain)[0])
        over_all += inputs * (1 if chain.regime.one_source else 2)
    passes = total * over_all + trained * (1 + _BACKWARD) + 7 * held_out  # errors before, between and after
    evaluated = 3 * work.evaluation_tokens / chain.tokens_ST.shape[1]
    # The softmax over the vocabulary in float32 takes twice as long as the product that it follows.
    return forward / chain.batch_size * (passes + evaluated * (1 + 3 * head / depth))


def _resident(chain: Chain, array_bytes: Needed) -> tuple[int, int]:
    """Bytes that this process keeps: its own, with the chain's arrays, and mapped ones; none of either on a GPU."""
    if chain.compute.device.type == "cuda":
        return 0, 0
    memory = psutil.Process().memory_info()
    there, shared = min(array_bytes.memory, chain.inputs_STD.nbytes), getattr(memory, "shared", 0)
    return memory.rss - shared + array_bytes.memory - there, shared


def _disk_bytes(
    windows: Sequence[AnyWindow], chain: Chain, array_bytes: Needed, *, in_memory: bool, linked: bool
) -> int:
    """What the output folder takes at most.

    The checkpoint, whose layers are the commits' files under second names, or copies of them; those of a window before
    they take the place of the dense ones, and of the halves before it. Of a model in memory the checkpoint is written
    beside the commits, and beside that of a run that was stopped. Masks; the states of three commits; arrays.
    """
    model = chain.decoder.model
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    masks = sum(parameter.numel() for parameter in model.parameters()) // 8
    states = sum(array_STD.nbytes for array_STD in chain.state().values())
    layers = {index for window in windows[:1] for index in window.span.indices}
    share = len(layers) / len(chain.decoder.layers)
    share *= 2 if isinstance(windows[0], HalfWindow) else 1
    return int(weights * (3 if in_memory else (1 if linked else 2) + share)) + 2 * masks + 3 * states + array_bytes.disk
