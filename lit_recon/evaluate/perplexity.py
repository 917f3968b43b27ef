"""Perplexity of a model, computed one layer at a time.

exp of the mean negative log-likelihood of every token but the first of each sequence. The hidden states of all
sequences step through the layers together, so that a device needs one layer and a slice of logits, not the model.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel

from lit_recon.data.packing import PADDING
from lit_recon.model.decoder import Decoder, call_layer, float32_on
from lit_recon.pruning.masks import PackedMasks
from lit_recon.system.device import Compute

LOGITS_BYTES = 64 * 2**20  # of one slice of logits in float32; softmax and its copy double it


@dataclass(frozen=True)
class Protocol:
    """How perplexity is measured; printed and stored with every number.

    Attributes:
        dataset: Name of the text.
        split: Part of it.
        context: Tokens per sequence.
        windows: Number of sequences, which do not overlap.
        tokens: Number of predicted tokens.
        precision: Lightning's name of the precision.
    """

    dataset: str
    split: str
    context: int
    windows: int
    tokens: int
    precision: str

    @classmethod
    def of(cls, tokens_ST: Tensor, *, dataset: str, precision: str) -> "Protocol":
        """The protocol of an evaluation part."""
        windows, context = tokens_ST.shape
        return cls(dataset, "evaluation", context, windows, windows * (context - 1), precision)

    def describe(self) -> str:
        """One line."""
        return (
            f"{self.dataset} ({self.split}), {self.windows} sequences of {self.context} tokens, "
            f"{self.tokens} predicted, {self.precision}"
        )


@torch.no_grad()
def final_states(
    decoder: Decoder, tokens_ST: Tensor, *, batch_size: int, compute: Compute, masks: PackedMasks | None = None
) -> Tensor:
    """Hidden states behind the last layer, (S, T, D) in float32 on the CPU; one layer at a time is on the device.

    Args:
        decoder: The model, in memory or mapped.
        tokens_ST: Token ids, PADDING where a sample holds no text.
        batch_size: Sequences per pass.
        compute: Device and precision.
        masks: Prune each layer by these while it is there.
    """
    batches = [slice(start, start + batch_size) for start in range(0, len(tokens_ST), batch_size)]
    hidden_STD = torch.cat([decoder.embed(tokens_ST[rows])[0].cpu() for rows in batches])
    for index, layer in enumerate(decoder.layers):
        pruned = masks.applied(layer, f"{decoder.prefix}.{index}") if masks else nullcontext()
        with float32_on(layer, compute.device), pruned:
            for rows in batches:
                call = decoder.calls(tokens_ST[rows])[index]
                inputs_BTD = hidden_STD[rows].to(compute.device, non_blocking=True)
                with compute.autocast():
                    hidden_STD[rows] = call_layer(layer, inputs_BTD, call).float().cpu()
    return hidden_STD


def relative_error(states_STD: Tensor, dense_STD: Tensor, tokens_ST: Tensor) -> float:
    """Mean squared error of hidden states over the variance of the dense model's, where samples hold text."""
    states_ND, dense_ND = states_STD[tokens_ST != PADDING], dense_STD[tokens_ST != PADDING]
    return ((states_ND - dense_ND).square().mean() / dense_ND.var(0, correction=0).mean()).item()


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokens_ST: Tensor, *, batch_size: int, compute: Compute, masks: PackedMasks | None = None
) -> float:
    """Perplexity of `model`, in memory or mapped, on S sequences of T tokens.

    Args:
        model: The model; its layers visit the device one at a time.
        tokens_ST: Token ids.
        batch_size: Sequences per pass.
        compute: Device and precision.
        masks: Prune the model's layers by these meanwhile.
    """
    decoder = Decoder(model, compute.device)
    hidden_STD = final_states(decoder, tokens_ST, batch_size=batch_size, compute=compute, masks=masks)
    metric = Perplexity().to(compute.device)
    for logits_BCV, targets_BC in _slices(decoder, hidden_STD, tokens_ST, compute):
        metric.update(logits_BCV, targets_BC)
    return metric.compute().item()


def _slices(
    decoder: Decoder, hidden_STD: Tensor, tokens_ST: Tensor, compute: Compute
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (1, C, V) and the tokens (1, C) they predict; C keeps a slice of logits within LOGITS_BYTES."""
    vocabulary = decoder.model.config.get_text_config().vocab_size
    width = max(1, LOGITS_BYTES // (4 * vocabulary))
    with decoder.ends_on(compute.device):
        for hidden_TD, tokens_T in zip(hidden_STD, tokens_ST, strict=True):
            for start in range(0, len(tokens_T) - 1, width):
                stop = min(start + width, len(tokens_T) - 1)
                with compute.autocast():
                    logits_BCV = decoder.logits(hidden_TD[None, start:stop].to(compute.device)).float()
                yield logits_BCV, tokens_T[None, start + 1 : stop + 1].to(compute.device)
