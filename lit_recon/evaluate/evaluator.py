"""The same measures for every state of a run: perplexity, and the error of the final hidden states.

The pruned model is the dense one, with a context around each layer in which the layer is pruned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.data.source import Samples
from lit_recon.evaluate.perplexity import perplexity, relative_error
from lit_recon.model.decoder import Decoder
from lit_recon.model.layerwise import LayerContext, final_states, unchanged
from lit_recon.system.clock import Clock
from lit_recon.system.device import Compute

LOGITS_OF = 64  # tokens, by which a model that was read back is compared with the one that was saved


@dataclass(frozen=True)
class Evaluator:
    """Measures models on the evaluation and the held-out samples.

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

    def perplexity(self, model: PreTrainedModel, around: LayerContext = unchanged) -> float:
        """Perplexity on the evaluation samples; `around` may change each layer, such as prune it."""
        with self.clock.phase("evaluate"):
            tokens_ST = self.samples.evaluation_ST
            return perplexity(
                model, tokens_ST, batch_size=self._batch_size(tokens_ST), compute=self.compute, around=around
            )

    @torch.no_grad()
    def final_states(self, model: PreTrainedModel, around: LayerContext = unchanged) -> Tensor:
        """Hidden states after the last layer on the held-out samples, (S, T, D)."""
        tokens_ST, decoder = self.samples.held_out_ST, Decoder(model, self.compute.device)
        with self.clock.phase("evaluate"):
            return final_states(
                decoder, tokens_ST, batch_size=self._batch_size(tokens_ST), compute=self.compute, around=around
            )

    def error(self, states_STD: Tensor, dense_STD: Tensor) -> float:
        """Relative error of final hidden states."""
        return relative_error(states_STD, dense_STD, self.samples.held_out_ST)

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> Tensor:
        """Logits of a few tokens, (1, T, V)."""
        decoder = Decoder(model, torch.device("cpu"))
        return decoder.model(self.samples.evaluation_ST[:1, :LOGITS_OF], use_cache=False).logits

    def _batch_size(self, tokens_ST: Tensor) -> int:
        return max(1, self.tokens_per_batch // tokens_ST.shape[1])
