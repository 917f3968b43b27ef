"""How good a model is: perplexity, and the error of its final hidden states, in the same way for every state of a run.

The checkpoint is read back as a user will. The pruned model is the dense one again, each layer times its masks while it
is looked at.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.data.source import Samples
from lit_recon.evaluate.perplexity import final_states, perplexity, relative_error
from lit_recon.model.decoder import Decoder
from lit_recon.model.loading import HubModel, LanguageModel
from lit_recon.pruning.masks import PackedMasks
from lit_recon.system.clock import Clock
from lit_recon.system.device import Compute

LOGITS_OF = 64  # tokens, by which a model that was read back is compared with the one that was saved


@dataclass(frozen=True)
class Judge:
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

    def perplexity(self, model: PreTrainedModel, masks: PackedMasks | None = None) -> float:
        """Perplexity on the evaluation samples; with `masks`, of the pruned model."""
        with self.clock.phase("evaluate"):
            tokens_ST = self.samples.evaluation_ST
            return perplexity(
                model, tokens_ST, batch_size=self._batch_size(tokens_ST), compute=self.compute, masks=masks
            )

    @torch.no_grad()
    def final_states(self, model: PreTrainedModel, masks: PackedMasks | None = None) -> Tensor:
        """Hidden states behind the last layer on the held-out samples, (S, T, D)."""
        tokens_ST, decoder = self.samples.held_out_ST, Decoder(model, self.compute.device)
        with self.clock.phase("evaluate"):
            return final_states(
                decoder, tokens_ST, batch_size=self._batch_size(tokens_ST), compute=self.compute, masks=masks
            )

    def error(self, states_STD: Tensor, dense_STD: Tensor) -> float:
        """Relative error of final hidden states."""
        return relative_error(states_STD, dense_STD, self.samples.held_out_ST)

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> Tensor:
        """Logits of a few tokens, (1, T, V)."""
        return model(self.samples.evaluation_ST[:1, :LOGITS_OF], use_cache=False).logits

    def _batch_size(self, tokens_ST: Tensor) -> int:
        return max(1, self.tokens_per_batch // tokens_ST.shape[1])


@dataclass(frozen=True)
class Saved:
    """What is known of a model that was saved and dropped.

    Attributes:
        folder: The checkpoint.
        masks: Its masks.
        logits_BTV: Its logits of a few tokens.
        dense_STD: The dense model's final states on the held-out samples; None if they are still to be computed.
    """

    folder: Path
    masks: PackedMasks
    logits_BTV: Tensor
    dense_STD: Tensor | None


def read_back(saved: Saved, dense: LanguageModel, judge: Judge) -> tuple[dict[str, float], dict[str, float]]:
    """Read the checkpoint as a user will, check and measure it, then the pruned model.

    Returns:
        Perplexities and relative errors of both.

    Raises:
        RuntimeError: A pruned weight is not zero, or the model computes other logits than the one that was saved.
    """
    with judge.clock.phase("load"):
        model = HubModel(name=str(saved.folder)).load()
    saved.masks.check(model)
    if not torch.equal(judge.logits(model), saved.logits_BTV):
        raise RuntimeError(f"{saved.folder}: the model that was read back computes other logits.")
    perplexities = {"reconstructed": judge.perplexity(model)}
    reconstructed_STD = judge.final_states(model)
    del model
    with judge.clock.phase("load"):
        model = dense.load()
    perplexities["pruned"] = judge.perplexity(model, saved.masks)
    dense_STD = judge.final_states(model) if saved.dense_STD is None else saved.dense_STD
    pruned_STD = judge.final_states(model, saved.masks)
    return perplexities, {
        "pruned": judge.error(pruned_STD, dense_STD),
        "reconstructed": judge.error(reconstructed_STD, dense_STD),
    }
