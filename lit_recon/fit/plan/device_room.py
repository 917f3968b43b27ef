"""Memory of a GPU that training a window takes at most, by its sizes alone: what is left of it may hold hidden states.

    24 bytes per parameter               master, gradient, two moments in float32; masks, copies in 16 bits, the start
    16 (inputs + outputs) per token      of each matrix: what the backward keeps, in float32 and twice

The plan (estimate.py) looks at a real batch, for which hidden states must be somewhere already.
"""

from collections.abc import Sequence

import torch

from lit_recon.model.windows import AnyWindow, enclosing_windows

_PER_PARAMETER, _PER_FEATURE = 24, 16
_IN_TRAINING = 12  # of the bytes per parameter: gradient and moments
_PASS_TOKENS = 2**15  # which keep any GPU busy


def training_room(windows: Sequence[AnyWindow], batch_tokens: int) -> int:
    """Bytes that the largest of some windows takes, trained on batches of so many tokens."""
    return max(
        _PER_PARAMETER * sum(parameter.numel() for parameter in window.parameters())
        + _PER_FEATURE * batch_tokens * sum(sum(matrix.weight.shape[-2:]) for matrix in window.matrices())
        for window in enclosing_windows(windows)
    )


def samples_per_pass(windows: Sequence[AnyWindow], batch_size: int, length: int, device: torch.device) -> int:
    """Samples that a GPU runs at once where nothing is trained: no more memory than gradient and moments would take.

    Small batches leave most of a GPU idle while the next kernels are launched; a CPU works off one after the other.
    """
    if device.type != "cuda":
        return batch_size
    rooms = []
    for window in enclosing_windows(windows):
        widest = max((sum(matrix.weight.shape[-2:]) for matrix in window.matrices()), default=1)
        parameters = sum(parameter.numel() for parameter in window.parameters())
        rooms.append(_IN_TRAINING * parameters // (_PER_FEATURE * widest))
    return max(batch_size, min(_PASS_TOKENS, min(rooms)) // length)
