"""The checkpoint read back as a user will read it: checked, and measured next to the dense and the pruned model."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.fit.dense_measure import DenseMeasure
from lit_recon.model.decoder import decoder_layers
from lit_recon.model.errors import Errors
from lit_recon.model.loading import HubModel, LanguageModel
from lit_recon.model.mapped_files import DenseFiles
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
        RuntimeError: A pruned weight is not zero, the model computes other logits than the one that was saved, or a
            tensor that no window changes is not the dense model's.
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
        check_unchanged(saved.folder, model)
    measured["pruned"] = evaluator.measure(model, partial(saved.masks.applied, changed=saved.pruned))
    dense_STD = measure.of(model).states_STD
    return Found(
        nats={state: one.nats for state, one in measured.items()},
        errors={state: evaluator.errors(one.states_STD, dense_STD) for state, one in measured.items()},
        zeros=zeros,
    )


def check_unchanged(folder: Path, dense: PreTrainedModel) -> None:
    """Check that what is in no layer of a checkpoint, and so in no window, has the dense model's values.

    Logits of a few tokens do not tell: they leave most rows of the embeddings out. A tensor at a time is mapped. What
    has another name in the files than in the model is left to the logits.

    Raises:
        RuntimeError: A tensor differs.
    """
    files, prefix = DenseFiles(sorted(folder.glob("*.safetensors"))), f"{decoder_layers(dense)[0]}."
    named = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    for name in (name for name in files.names if name in named and not name.startswith(prefix)):
        if not torch.equal(files.tensors([name])[name], named[name]):
            raise RuntimeError(f"{folder}: {name} is in no window, and differs from the dense model's.")
