"""The checkpoint read back as a user will read it: checked, and measured next to the dense and the pruned model."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lit_recon.fit.dense_measure import DenseMeasure
from lit_recon.model.errors import Errors
from lit_recon.model.loading import HubModel, LanguageModel
from lit_recon.pruning.masks import Masks, StoredWeights


@dataclass(frozen=True)
class Saved:
    """What is known of a model that was saved and dropped from memory.

    Attributes:
        folder: The checkpoint.
        masks: Its masks.
        logits_BTV: Its logits of a few tokens.
        pruned: The weights that the criterion left before training, where it changes them.
    """

    folder: Path
    masks: Masks
    logits_BTV: Tensor
    pruned: StoredWeights = field(default_factory=StoredWeights)


@dataclass(frozen=True)
class Found:
    """What the checkpoint and the pruned model were measured at.

    Attributes:
        nats: Mean negative log-likelihoods on the evaluation samples, by state ("pruned", "reconstructed").
        errors: Errors of the final hidden states, relative to the dense model's, by state.
        zeros: Exact zeros of the checkpoint, by matrix.
    """

    nats: dict[str, float]
    errors: dict[str, Errors]
    zeros: dict[str, int]


def read_back(saved: Saved, dense: LanguageModel, measure: DenseMeasure) -> Found:
    """Read the checkpoint as a user will, check and measure it, then the pruned model; `measure` knows the dense one.

    Raises:
        RuntimeError: A pruned weight is not zero, or the model computes other logits than the one that was saved.
    """
    evaluator = measure.evaluator
    with evaluator.clock.phase("load"):
        model = HubModel(name=str(saved.folder), attention=dense.attention).load()
    zeros = saved.masks.count_zeros(model)
    if not torch.equal(evaluator.logits(model), saved.logits_BTV):
        raise RuntimeError(f"{saved.folder}: the model that was read back computes other logits.")
    measured = {"reconstructed": evaluator.measure(model)}
    del model
    with evaluator.clock.phase("load"):
        model = dense.load()
    measured["pruned"] = evaluator.measure(model, partial(saved.masks.applied, changed=saved.pruned))
    dense_STD = measure.of(model).states_STD
    return Found(
        nats={state: one.nats for state, one in measured.items()},
        errors={state: evaluator.errors(one.states_STD, dense_STD) for state, one in measured.items()},
        zeros=zeros,
    )
