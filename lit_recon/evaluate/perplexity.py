"""Perplexity of a model, computed one layer at a time.

exp of the mean negative log-likelihood of every token but those that open a sequence, the first at least. The hidden
states of all sequences step through the layers together, so that a device needs one layer and a slice of logits, not
the model.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from transformers import PreTrainedModel

from lit_recon.data.packing import PADDING
from lit_recon.model.decoder import Decoder
from lit_recon.model.errors import Errors, unit_of
from lit_recon.model.head import Head
from lit_recon.model.layerwise import LayerContext, final_states, unchanged
from lit_recon.system.device import Compute

LOGITS_BYTES = 64 * 2**20  # of one slice of logits in float32; their softmax doubles it


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """How perplexity is measured; printed and stored with every number.

    Attributes:
        dataset: Name of the text.
        split: Its split, such as "test"; "evaluation" where lit_recon keeps a part of the text for it.
        context: Tokens per sequence.
        windows: Number of sequences.
        tokens: Number of predicted tokens.
        precision: Lightning's name of the precision.
        opening: Tokens that the tokenizer puts before a text, such as `<s>`, or "none".
        opening_at: Where they stand: in each "window", or as in papers before the whole "text" alone.
        stride: Tokens from the start of one sequence to that of the next; None: they do not overlap.
    """

    dataset: str
    split: str
    context: int
    windows: int
    tokens: int
    precision: str
    opening: str = "none"
    opening_at: str = "window"
    stride: int | None = None

    @classmethod
    def from_tokens(
        cls,
        tokens_ST: Tensor,
        *,
        dataset: str,
        precision: str,
        split: str = "evaluation",
        opening: str = "none",
        given: int = 1,
    ) -> "EvaluationProtocol":
        """The protocol of an evaluation part, of which the first `given` tokens of each sequence are not predicted."""
        windows, context = tokens_ST.shape
        return cls(
            dataset=dataset,
            split=split,
            context=context,
            windows=windows,
            tokens=windows * (context - given),
            precision=precision,
            opening=opening,
        )

    def describe(self) -> str:
        """One line."""
        who = "the text" if self.opening_at == "text" else "each"
        opened = f", {who} after {self.opening}" if self.opening != "none" else ""
        overlapping = f" every {self.stride}" if self.stride is not None else ""
        split = "" if self.dataset.endswith(f" {self.split}") else f" ({self.split})"  # some data sets name it
        return (
            f"{self.dataset}{split}, {self.windows} sequences of {self.context} tokens{overlapping}{opened}, "
            f"{self.tokens} predicted, {self.precision}"
        )


def state_errors(states_STD: Tensor, dense_STD: Tensor, tokens_ST: Tensor) -> Errors:
    """Squared errors of hidden states, where samples hold text, in units of the median energy of the dense model's.

    Args:
        states_STD: Hidden states, (S, T, D).
        dense_STD: The dense model's.
        tokens_ST: Token ids, PADDING where a sample holds no text.
    """
    text_ST = tokens_ST != PADDING
    unit = unit_of(dense_STD.square().mean(-1)[text_ST])
    return Errors.from_tokens((states_STD - dense_STD).square().mean(-1)[text_ST] / unit)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokens_ST: Tensor,
    *,
    given: int = 1,
    batch_size: int = 1,
    compute: Compute | None = None,
    around: LayerContext = unchanged,
) -> float:
    """Perplexity of `model`, in memory or mapped, on S sequences of T tokens.

    Args:
        model: The model; its layers visit the device one at a time.
        tokens_ST: Token ids.
        given: First tokens of each sequence that are not predicted (`Samples.num_given`).
        batch_size: Sequences per pass.
        compute: Device and precision; None: those that a run would choose.
        around: Makes a context for each layer while it is on the device, such as one in which it is pruned.
    """
    compute = compute or Compute.default()
    decoder = Decoder(model, compute.device)
    hidden_STD = final_states(decoder, tokens_ST, batch_size=batch_size, compute=compute, around=around)
    return perplexity_of(fmean(negative_log_likelihoods(decoder, hidden_STD, tokens_ST, compute, given)))


def perplexity_of(nats: float) -> float:
    """Perplexity: exp of a mean negative log-likelihood; infinite where that overflows, NaN of NaN."""
    return math.exp(nats) if not nats > math.log(sys.float_info.max) else math.inf


def share_recovered(dense: float, pruned: float, reconstructed: float) -> float | None:
    """Share of pruned minus dense that was won back; None where pruning cost nothing or a value is not finite."""
    is_known = all(map(math.isfinite, (dense, pruned, reconstructed))) and pruned > dense
    return (pruned - reconstructed) / (pruned - dense) if is_known else None


class NegativeLogLikelihood(Metric):
    """Mean negative log-likelihood of the predicted tokens of each sequence, in nats.

    By cross entropy, which is finite also where a token's probability is not above zero in float32; summed in float64.
    (`torchmetrics.text.Perplexity` takes the logarithm of a softmax, and one such token makes it infinite.)

    Args:
        num_sequences: S.
    """

    nats_S: Tensor
    tokens_S: Tensor

    def __init__(self, num_sequences: int) -> None:
        super().__init__()
        for name in ("nats_S", "tokens_S"):
            self.add_state(name, torch.zeros(num_sequences, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, row: int, logits_CV: Tensor, targets_C: Tensor) -> None:
        """Add C tokens of a sequence, with the logits that predict them."""
        self.nats_S[row] += functional.cross_entropy(logits_CV, targets_C, reduction="none").sum(dtype=torch.float64)
        self.tokens_S[row] += len(targets_C)

    def compute(self) -> Tensor:
        """The mean of each sequence, (S) in float64."""
        return self.nats_S / self.tokens_S


@torch.no_grad()
def negative_log_likelihoods(
    decoder: Decoder, hidden_STD: Tensor, tokens_ST: Tensor, compute: Compute, given: int = 1
) -> list[float]:
    """Mean negative log-likelihood of each sequence, but for its first tokens, in nats.

    Args:
        decoder: The model.
        hidden_STD: Its hidden states after the last layer.
        tokens_ST: Token ids.
        compute: Device and precision.
        given: First tokens of each sequence that are not predicted.
    """
    metric, head = NegativeLogLikelihood(len(tokens_ST)).to(compute.device), Head(decoder)
    with head.on(compute.device):
        for row, start, stop in spans(tokens_ST, [given] * len(tokens_ST), num_logits(decoder)):
            logits_CV = logits(head, hidden_STD[row, start:stop], compute)
            metric.update(row, logits_CV, tokens_ST[row, start + 1 : stop + 1].to(compute.device))
    return metric.compute().reshape(-1).tolist()  # torchmetrics makes a scalar of one entry


def num_logits(decoder: Decoder) -> int:
    """Tokens of a slice, which keep their logits in float32 within LOGITS_BYTES."""
    vocabulary = decoder.model.config.get_text_config().vocab_size
    return max(1, LOGITS_BYTES // (4 * vocabulary))


def spans(tokens_ST: Tensor, first_S: Sequence[int], width: int) -> Iterator[tuple[int, int, int]]:
    """Row, start and stop of slices of positions whose next tokens are predicted, `width` positions at most.

    Args:
        tokens_ST: Token ids, PADDING at the end of a row that is shorter.
        first_S: The first token of each row that is predicted.
        width: Positions of a slice.
    """
    for row, (first, length) in enumerate(zip(first_S, (tokens_ST != PADDING).sum(1).tolist(), strict=True)):
        for start in range(first - 1, length - 1, width):
            yield row, start, min(start + width, length - 1)


def logits(head: Head, hidden_CD: Tensor, compute: Compute) -> Tensor:
    """Logits of some positions, (C, V) in float32; the head is on the device.

    Args:
        head: Of the model.
        hidden_CD: Hidden states after the last layer.
        compute: Device and precision.
    """
    with compute.autocast():
        return head(hidden_CD[None].to(compute.device))[0].float()
