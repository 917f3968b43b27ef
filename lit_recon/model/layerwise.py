"""A forward pass with one layer at a time on the device, in float32: all samples step through the layers together.

Shapes: S samples, B samples of a batch, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lit_recon.model.decoder import Decoder, call_layer, tensors_returned
from lit_recon.system.device import Compute

_SHARE = 0.5  # of a GPU's free memory: what hidden states may take
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
            parameter.data = parameter.data.to(device).to(torch.float32)  # moved before it grows
        module.to(device)  # buffers
        yield


def place_of_states(nbytes: int, device: torch.device) -> torch.device:
    """Where hidden states of this size are kept: on a GPU where half of what is free holds them, else on the CPU."""
    fits = device.type == "cuda" and nbytes <= _SHARE * torch.cuda.mem_get_info(device)[0]
    return device if fits else torch.device("cpu")


@torch.no_grad()
def embedded(decoder: Decoder, tokens_ST: Tensor, *, batch_size: int, device: torch.device | None = None) -> Tensor:
    """What reaches layer 0, (S, T, D) in float32 on the CPU, or on a GPU that has room for it.

    Args:
        decoder: The model, in memory or mapped.
        tokens_ST: Token ids, PADDING where a sample holds no text.
        batch_size: Sequences per pass.
        device: Where layers will be run; None: hidden states stay on the CPU.
    """
    batches = tokens_ST.split(batch_size)
    first_BTD = decoder.embed(batches[0])[0]
    place = place_of_states(tokens_ST.numel() * first_BTD[0, 0].nbytes, device or torch.device("cpu"))
    # Not joined at the end: that takes twice.
    hidden_STD = first_BTD.new_empty(*tokens_ST.shape, first_BTD.shape[-1], device=place)
    hidden_STD[:batch_size] = first_BTD
    for number, tokens_BT in enumerate(batches[1:], 1):
        hidden_STD[number * batch_size : (number + 1) * batch_size] = decoder.embed(tokens_BT)[0]
    return hidden_STD


@torch.no_grad()
def step(
    decoder: Decoder,
    index: int,
    hidden_STD: Tensor,
    tokens_ST: Tensor,
    *,
    batch_size: int,
    compute: Compute,
    around: LayerContext = unchanged,
) -> None:
    """Replace the inputs of a layer, (S, T, D) in float32 on the CPU or the device, by its outputs.

    The layer visits the device.

    Args:
        decoder: The model, in memory or mapped.
        index: Of the layer.
        hidden_STD: Its inputs.
        tokens_ST: Token ids, PADDING where a sample holds no text.
        batch_size: Sequences per pass.
        compute: Device and precision.
        around: Makes a context for the layer, and its name in the model, while it is on the device.
    """
    layer = decoder.layers[index]
    with float32_on(layer, compute.device), around(layer, f"{decoder.prefix}.{index}"):
        for start in range(0, len(tokens_ST), batch_size):
            rows = slice(start, start + batch_size)
            call = decoder.calls(tokens_ST[rows])[index]
            inputs_BTD = hidden_STD[rows].to(compute.device, non_blocking=True)
            with compute.autocast():
                hidden_STD[rows] = call_layer(layer, inputs_BTD, call).float()


@torch.no_grad()
def final_states(
    decoder: Decoder, tokens_ST: Tensor, *, batch_size: int, compute: Compute, around: LayerContext = unchanged
) -> Tensor:
    """Hidden states after the last layer, (S, T, D) in float32, on the device if it has room; layers visit it in turn.

    Args:
        decoder: The model, in memory or mapped.
        tokens_ST: Token ids, PADDING where a sample holds no text.
        batch_size: Sequences per pass.
        compute: Device and precision.
        around: Makes a context for each layer, and its name in the model, while it is on the device.
    """
    hidden_STD = embedded(decoder, tokens_ST, batch_size=batch_size, device=compute.device)
    for index in range(len(decoder.layers)):
        step(decoder, index, hidden_STD, tokens_ST, batch_size=batch_size, compute=compute, around=around)
    return hidden_STD
