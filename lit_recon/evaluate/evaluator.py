"""The same measures for every state of a run: perplexity, and the errors of the final hidden states.

The pruned model is the dense one, with a context around each layer in which the layer is pruned.
"""

import math
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.data.source import Samples
from lit_recon.evaluate.perplexity import negative_log_likelihoods, state_errors
from lit_recon.model.decoder import Decoder
from lit_recon.model.errors import Errors
from lit_recon.model.layerwise import LayerContext, final_states, unchanged
from lit_recon.system.clock import Clock
from lit_recon.system.device import Compute
from lit_recon.system.finite import NotFinite

LOGITS_OF = 64  # tokens, by which a model that was read back is compared with the one that was saved


@dataclass(frozen=True)
class Measured:
    """What a model was measured at.

    Attributes:
        by_sample: Mean negative log-likelihood of each evaluation sample, in nats per token.
        states_STD: Final hidden states by which models are compared.
    """

    by_sample: list[float]
    states_STD: Tensor

    @property
    def nats(self) -> float:
        """Mean negative log-likelihood, in nats per token."""
        return fmean(self.by_sample)

    def check(self, precision: str) -> None:
        """Raise a NotFinite that names the first sample whose likelihood is not finite."""
        bad = [index for index, nats in enumerate(self.by_sample) if not math.isfinite(nats)]
        if bad:
            advice = " (bf16-mixed and 32-true reach further)" if precision == "16-mixed" else ""
            raise NotFinite(
                f"the dense model's perplexity is not finite: {len(bad)} of {len(self.by_sample)} evaluation samples, "
                f"first sample {bad[0]}, in trainer.precision={precision}{advice}. Nothing could be compared with it; "
                "use another precision, another copy of the model, another model.dtype, or other evaluation text."
            )


@dataclass(frozen=True)
class Evaluator:
    """Measures models on the evaluation samples.

    Attributes:
        samples: The samples.
        tokens_per_batch: Tokens of a batch.
        compute: Device and precision.
        clock: Takes the seconds.
    """

    samples: Samples
    tokens_per_batch: int
    compute: Compute
    clock: Clock

    @torch.no_grad()
    def measure(self, model: PreTrainedModel, around: LayerContext = unchanged) -> Measured:
        """Measure a model on the evaluation samples; `around` may change each layer, such as prune it."""
        tokens_ST, decoder = self.samples.evaluation_ST, Decoder(model, self.compute.device)
        with self.clock.phase("evaluate"):
            states_STD = self._states(decoder, tokens_ST, around)
            given = self.samples.num_given
            nats = negative_log_likelihoods(decoder, states_STD, tokens_ST, self.compute, given)
            return Measured(nats, states_STD[: self.num_compared].to("cpu", copy=True))

    def _states(self, decoder: Decoder, tokens_ST: Tensor, around: LayerContext) -> Tensor:
        size = max(1, self.tokens_per_batch // tokens_ST.shape[1])
        return final_states(decoder, tokens_ST, batch_size=size, compute=self.compute, around=around)

    @property
    def num_compared(self) -> int:
        """Evaluation samples whose final states are compared: the first ones, as many tokens as are held out.

        Held-out samples would flatter a model: they decided which reconstructions were accepted.
        """
        return -(-self.samples.held_out_ST.numel() // self.samples.evaluation_ST.shape[1])

    def errors(self, states_STD: Tensor, dense_STD: Tensor) -> Errors:
        """Errors of final hidden states, mean and typical, relative to the dense model's."""
        return state_errors(states_STD, dense_STD, self.samples.evaluation_ST[: self.num_compared])

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> Tensor:
        """Logits of a few tokens, (1, T, V)."""
        decoder = Decoder(model, torch.device("cpu"))
        return decoder.model(self.samples.evaluation_ST[:1, :LOGITS_OF], use_cache=False).logits
