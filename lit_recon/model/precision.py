"""Precision by measurement: bf16-mixed only where a training step of the model's first layer is faster in it.

That a CPU has instructions for bfloat16 is necessary, not sufficient: on one with avx512_bf16 a step took 2.7 times as
long as in float32. A forward and a backward of a random layer of the model's size are timed in both, in turn; what was
measured is kept in the cache folder by CPU, version of torch, number of threads and layer.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_recon.model.decoder import Decoder, LayerCall, call_layer
from lit_recon.model.few_layers import few_layers
from lit_recon.system.cache import place_of, remembered
from lit_recon.system.device import Compute, bf16_is_fast, cpu_name

log = logging.getLogger(__name__)

FASTER = 1.3  # times, at least, that bf16 must be to be worth its rounding
BOTH = ("32-true", "bf16-mixed")
TOKENS = 512  # of the batch, at most
_ROUNDS, _SECONDS = 5, 1.0  # the best of so many, or of as many as fit into a second
_FILE = "seconds.json"
_VOCABULARY = 64  # embeddings are not timed


def with_measured_precision(compute: Compute, model: PreTrainedModel, tokens: int) -> Compute:
    """Device and precision, of which "auto" has chosen the latter, with the precision that is faster on this CPU.

    Args:
        compute: What "auto" has chosen by the instructions that there are.
        model: The model; its weights are not used.
        tokens: Of a batch.
    """
    if compute.device.type != "cpu" or not bf16_is_fast(compute.device):
        return compute
    try:
        seconds = _seconds(model, min(tokens, TOKENS))
    except Exception as error:  # whatever a model's code raises on a random layer of its own
        log.info("precision: a layer of the model could not be timed (%s)", error)
        return replace(compute, precision="32-true")
    is_faster = seconds["32-true"] >= FASTER * seconds["bf16-mixed"]
    return replace(compute, precision="bf16-mixed" if is_faster else "32-true", measured=seconds)


def describe_measured(compute: Compute) -> str:
    """What was measured, in words."""
    ratio = compute.measured["32-true"] / compute.measured["bf16-mixed"]
    return f"bf16-mixed is {ratio:.2g} times as fast as 32-true on a layer here (taken from {FASTER:g} on)"


def _seconds(model: PreTrainedModel, tokens: int) -> dict[str, float]:
    """Seconds of a step in each precision, as they were measured here first."""
    decides = {
        "cpu": cpu_name(),
        "torch": version("torch"),
        "threads": torch.get_num_threads(),
        "config": model.config.to_dict(),
        "tokens": tokens,
    }
    place = place_of("precision", decides)
    return remembered(place, lambda: time_steps(model, tokens), write=_write, read=_read)


def _write(folder: Path, seconds: dict[str, float]) -> None:
    """Write what was measured into a folder."""
    (folder / _FILE).write_text(json.dumps(seconds), encoding="utf-8")


def _read(folder: Path) -> dict[str, float]:
    """What was written."""
    return json.loads((folder / _FILE).read_text(encoding="utf-8"))


def time_steps(model: PreTrainedModel, tokens: int) -> dict[str, float]:
    """Seconds of a forward and a backward of a layer of a model's class and size, in each precision; the best of some.

    Args:
        model: The model; its weights are not used.
        tokens: In one sequence.
    """
    with torch.random.fork_rng(devices=[]):
        small = few_layers(model, {"vocab_size": _VOCABULARY}, depth=1)
    tokens_BT = torch.randint(_VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(small, torch.device("cpu"))
    calls, layer = decoder.calls(tokens_BT), decoder.layers[0].requires_grad_(True)
    hidden_BTD = decoder.embed(tokens_BT)[0].float()
    computes = [Compute(torch.device("cpu"), precision) for precision in BOTH]
    for one in computes:
        _step(layer, hidden_BTD, calls, one)  # the first pays for set-up
    seconds: dict[str, list[float]] = {precision: [] for precision in BOTH}
    began = time.perf_counter()
    while len(seconds[BOTH[0]]) < _ROUNDS and (not seconds[BOTH[0]] or time.perf_counter() - began < _SECONDS):
        for one in computes:
            seconds[one.precision].append(_step(layer, hidden_BTD, calls, one))
    return {precision: min(found) for precision, found in seconds.items()}


def _step(layer: nn.Module, hidden_BTD: Tensor, calls: Sequence[LayerCall], compute: Compute) -> float:
    """Seconds of a forward and a backward."""
    start = time.perf_counter()
    with compute.autocast():
        outputs_BTD = call_layer(layer, hidden_BTD, calls[0])
    outputs_BTD.float().square().mean().backward()
    layer.zero_grad(set_to_none=True)
    return time.perf_counter() - start
