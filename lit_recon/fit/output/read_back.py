"""The checkpoint read back as a user will read it: checked, and measured next to the dense and the pruned model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_recon.evaluate.evaluator import Evaluator
from lit_recon.model.loading import HubModel, LanguageModel
from lit_recon.pruning.masks import Masks


@dataclass(frozen=True)
class Saved:
    """What is known of a model that was saved and dropped from memory.

    Attributes:
        folder: The checkpoint.
        masks: Its masks.
        logits_BTV: Its logits of a few tokens.
        dense_STD: The dense model's final states on the held-out samples; None if they are still to be computed.
    """

    folder: Path
    masks: Masks
    logits_BTV: Tensor
    dense_STD: Tensor | None


def read_back(saved: Saved, dense: LanguageModel, evaluator: Evaluator) -> tuple[dict[str, float], dict[str, float]]:
    """Read the checkpoint as a user will, check and measure it, then the pruned model.

    Returns:
        Perplexities and relative errors of both.

    Raises:
        RuntimeError: A pruned weight is not zero, or the model computes other logits than the one that was saved.
    """
    with evaluator.clock.phase("load"):
        model = HubModel(name=str(saved.folder), attention=dense.attention).load()
    saved.masks.check(model)
    if not torch.equal(evaluator.logits(model), saved.logits_BTV):
        raise RuntimeError(f"{saved.folder}: the model that was read back computes other logits.")
    perplexities = {"reconstructed": evaluator.perplexity(model)}
    reconstructed_STD = evaluator.final_states(model)
    del model
    with evaluator.clock.phase("load"):
        model = dense.load()
    perplexities["pruned"] = evaluator.perplexity(model, saved.masks.applied)
    dense_STD = evaluator.final_states(model) if saved.dense_STD is None else saved.dense_STD
    pruned_STD = evaluator.final_states(model, saved.masks.applied)
    return perplexities, {
        "pruned": evaluator.error(pruned_STD, dense_STD),
        "reconstructed": evaluator.error(reconstructed_STD, dense_STD),
    }
