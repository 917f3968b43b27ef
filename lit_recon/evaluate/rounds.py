"""How many windows of a text are measured at once: as many as their hidden states fit into memory.

memory = what the process has + a layer in float32 and what it computes, or logits + hidden states of a round
"""

from collections.abc import Sequence
from typing import NamedTuple

import psutil

from lit_recon.evaluate.perplexity import LOGITS_BYTES
from lit_recon.model.decoder import Decoder
from lit_recon.system.memory import own_memory_bytes
from lit_recon.system.units import in_gb

_FLOAT = 4  # bytes
_FREE = 0.5  # share of the free memory that may be taken without a limit
_STATES = 8  # arrays of hidden size that a layer has at once: q, k, v, ...
_WIDE = 4  # of the MLP's: gate, up, ...
_LOGITS = 6  # slices that are there at once besides the logits of each state: the terms of a divergence


class Rounds(NamedTuple):
    """How windows are taken.

    Attributes:
        size: Windows of a round.
        batch_size: Windows per pass of a layer, the asked ones at most.
    """

    size: int
    batch_size: int


def choose_rounds(decoders: Sequence[Decoder], shape: tuple[int, int], *, batch_size: int, limit: int | None) -> Rounds:
    """The largest rounds that fit.

    Args:
        decoders: One for each state that is measured; the same where two states share a model.
        shape: Windows, and tokens of each.
        batch_size: Windows per pass that were asked for.
        limit: Bytes that the process may have of its own; None: what it has and half of what is free.

    Raises:
        ValueError: Not one window fits; the message has the numbers.
    """
    windows, length = shape
    now = own_memory_bytes()
    most = limit if limit is not None else now + int(_FREE * psutil.virtual_memory().available)
    state = sum(_FLOAT * length * decoder.model.config.get_text_config().hidden_size for decoder in decoders)
    layers = sum(len(decoder.layers) for decoder in decoders)
    kept = now + windows * 2 * _FLOAT * length * layers  # errors and energies of tokens
    for size in dict.fromkeys((batch_size, *(2**power for power in range(batch_size.bit_length() - 1, -1, -1)))):
        if size > batch_size:
            continue
        left = most - kept - max(_layer_bytes(decoders, size, length), (_LOGITS + len(decoders)) * LOGITS_BYTES)
        fitting = min(windows, int(left // state)) // size * size if left < windows * state else windows
        if fitting > 0:
            return Rounds(fitting, size)
    needed = kept + max(_layer_bytes(decoders, 1, length), (_LOGITS + len(decoders)) * LOGITS_BYTES) + state
    what = "half of the free memory" if limit is None else f"memory_limit={in_gb(most)}"
    raise ValueError(
        f"{what}: one window of {length} tokens in {len(decoders)} states needs {in_gb(needed)}, of which the process "
        f"has {in_gb(now)} already. Raise the limit, or use shorter windows (data.evaluation_length)."
    )


def _layer_bytes(decoders: Sequence[Decoder], batch_size: int, length: int) -> int:
    """The largest layer in float32, and what it computes for a batch."""
    weights, computed = 0, 0
    for decoder in decoders:
        config = decoder.model.config.get_text_config()
        wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        numbers = _STATES * config.hidden_size + _WIDE * wide + 2 * length  # and the masks
        computed = max(computed, _FLOAT * batch_size * length * numbers)
        for layer in decoder.layers:
            weights = max(weights, _FLOAT * sum(parameter.numel() for parameter in layer.parameters()))
    return weights + computed
