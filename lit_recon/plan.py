"""The plan of a run: what will be pruned and reconstructed, and what it will take, before any of it is done.

Memory is counted, not guessed: what a window's backward keeps is read off one real forward through autograd's own
hooks, and the same forward is timed to tell how long the walk will take.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.activations import Chain
from lit_recon.blocks import float32_on
from lit_recon.evaluate import LOGITS_BYTES
from lit_recon.windows import Window

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
    """

    epochs: int
    max_steps: int
    accumulate: int
    evaluation_tokens: int


@dataclass(frozen=True)
class Plan:
    """What a run will do and what it will take.

    Attributes:
        windows: Number of windows.
        parameters: Parameters of the model.
        prunable: Parameters that the criterion scores.
        unscored: Matrices of the layers that it does not.
        steps: Optimizer steps per window.
        peak_bytes: Predicted peak memory.
        seconds: Predicted time of walk and evaluation.
    """

    windows: int
    parameters: int
    prunable: int
    unscored: int
    steps: int
    peak_bytes: int
    seconds: float


def steps_per_window(chain: Chain, work: Workload) -> int:
    """Optimizer steps of each window."""
    batches = -(-chain.num_samples // chain.batch_size)
    steps = work.epochs * -(-batches // work.accumulate) if work.epochs > 0 else work.max_steps
    return steps if work.max_steps < 0 else min(steps, work.max_steps)


def make_plan(windows: Sequence[Window], chain: Chain, work: Workload) -> Plan:
    """Measure the first window on one batch and extrapolate.

    Args:
        windows: All windows, with the model's weights.
        chain: The chain at the first window.
        work: How often each of them will be run.
    """
    model = chain.decoder.model
    found = [matrix for window in windows for matrix in window.matrices()]
    scored = sum(matrix.weight.numel() for matrix in found if matrix.input_dim is not None)
    saved_bytes, forward_seconds = _probe(windows[0], chain)
    steps = steps_per_window(chain, work)
    largest = max(sum(parameter.numel() for parameter in window.parameters()) for window in windows)
    # Besides the weights themselves: gradients, two moments, and the pruned weights to go back to.
    training = largest * 4 * _FLOAT32 + saved_bytes
    head_weights = model.get_output_embeddings().weight.numel()
    # Logits, their softmax and two copies on the way; autocast's copy of the head in 16 bits.
    evaluation = 4 * LOGITS_BYTES + 2 * head_weights
    hidden = chain.inputs_STD[0, 0].numel() * work.evaluation_tokens * _FLOAT32
    per_sample = forward_seconds / chain.batch_size * len(windows)
    total, held_out = len(chain.tokens_ST), chain.num_held_out
    trained = steps * work.accumulate * chain.batch_size
    passes = total + trained * (1 + _BACKWARD) + 7 * held_out  # errors before, between and after
    evaluated = 3 * work.evaluation_tokens / chain.tokens_ST.shape[1]
    # The softmax over the vocabulary in float32 takes twice as long as the product that it follows.
    body = sum(parameter.numel() for window in windows for parameter in window.parameters())
    head = 1 + 3 * head_weights / max(1, body)
    return Plan(
        windows=len(windows),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        prunable=scored,
        unscored=sum(matrix.input_dim is None for matrix in found),
        steps=steps,
        peak_bytes=_resident(model, chain, largest) + max(training, evaluation + hidden),
        seconds=per_sample * (passes + evaluated * head),
    )


def _resident(model: PreTrainedModel, chain: Chain, largest: int) -> int:
    """Bytes that stay through the run: on a GPU a window's masters; on the CPU this process and the whole model.

    The model's file may be mapped and not read yet, so its size is added to what is resident without shared pages.
    """
    masters = largest * _FLOAT32
    if chain.compute.device.type == "cuda":
        return masters
    memory = psutil.Process().memory_info()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return memory.rss - getattr(memory, "shared", 0) + weights + (0 if model.dtype == torch.float32 else masters)


def _probe(window: Window, chain: Chain) -> tuple[int, float]:
    """Bytes that autograd keeps for one batch's backward beside the weights, and the seconds of a forward."""
    rows = slice(0, min(chain.batch_size, chain.num_samples))
    kept: dict[int, int] = {}
    with float32_on(window, chain.compute.device):
        chain.outputs(window, rows)  # the first call of a shape pays for set-up
        seconds = min(_seconds(window, chain, rows) for _ in range(5))
        weights = {parameter.untyped_storage().data_ptr() for parameter in window.parameters()}

        def count(tensor: Tensor) -> None:  # nothing is unpacked; a tensor kept here would keep the graph for ever
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()

        window.requires_grad_(True)
        inputs_BTD = chain.inputs_STD[rows].to(chain.compute.device)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda nothing: nothing), chain.compute.autocast():
            window(inputs_BTD, chain.decoder.calls(chain.tokens_ST[rows]))
        window.requires_grad_(False)
    return sum(kept.values()), seconds


def _seconds(window: Window, chain: Chain, rows: slice) -> float:
    start = time.perf_counter()
    chain.outputs(window, rows).sum().item()  # reading a value waits for a GPU
    return time.perf_counter() - start
