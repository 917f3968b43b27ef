"""A forward pass with one layer at a time on the device, in float32: all samples step through the layers together.

Shapes: S samples, B samples of a batch, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lit_recon.model.decoder import Decoder, call_layer, tensors_returned
from lit_recon.system.device import Compute

LayerContext = Callable[[nn.Module, str], AbstractContextManager]  # of a layer and its name in the model


def unchanged(layer: nn.Module, name: str) -> AbstractContextManager:
    """The layer as it is."""
    return nullcontext()


@contextmanager
def float32_on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A module on `device` with float32 parameters; its own, which may be mapped from a file, return afterwards.

    Buffers keep their dtype: the rotary frequencies of a bf16 model are float32 and would not survive the way back.
    """
    with tensors_returned(module.modules()):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(device, torch.float32)
        module.to(device)  # buffers
        yield


@torch.no_grad()
def final_states(
    decoder: Decoder, tokens_ST: Tensor, *, batch_size: int, compute: Compute, around: LayerContext = unchanged
) -> Tensor:
    """Hidden states after the last layer, (S, T, D) in float32 on the CPU; one layer at a time is on the device.

    Args:
        decoder: The model, in memory or mapped.
        tokens_ST: Token ids, PADDING where a sample holds no text.
        batch_size: Sequences per pass.
        compute: Device and precision.
        around: Makes a context for each layer, and its name in the model, while it is on the device.
    """
    batches = [slice(start, start + batch_size) for start in range(0, len(tokens_ST), batch_size)]
    hidden_STD = torch.cat([decoder.embed(tokens_ST[rows])[0].cpu() for rows in batches])
    for index, layer in enumerate(decoder.layers):
        with float32_on(layer, compute.device), around(layer, f"{decoder.prefix}.{index}"):
            for rows in batches:
                call = decoder.calls(tokens_ST[rows])[index]
                inputs_BTD = hidden_STD[rows].to(compute.device, non_blocking=True)
                with compute.autocast():
                    hidden_STD[rows] = call_layer(layer, inputs_BTD, call).float().cpu()
    return hidden_STD
