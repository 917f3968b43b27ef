"""Block influence is one minus the cosine between what a window is given and what it makes of it."""

import pytest
import torch
from conftest import chain_of
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from lit_recon.activations.block_influence import block_influence, most_alike
from lit_recon.data.packing import PADDING
from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import partition


@torch.no_grad()
def by_transformers(model: PreTrainedModel, tokens_ST: Tensor) -> list[float]:
    """One minus the mean cosine between the states around each layer but the last, whose states have the last norm."""
    totals, count = torch.zeros(len(model.model.layers) - 1, dtype=torch.float64), 0
    for tokens_T in tokens_ST:
        text_T = tokens_T[tokens_T != PADDING]
        states = model(text_T[None], output_hidden_states=True).hidden_states[:-1]
        cosines = [functional.cosine_similarity(a, b, dim=-1) for a, b in zip(states, states[1:], strict=False)]
        totals += torch.stack(cosines).double().sum((1, 2))
        count += len(text_T)
    return (1 - totals / count).tolist()


def test_the_influence_is_that_of_the_definition_on_calibration_samples_without_padding(padded_ST: Tensor) -> None:
    model = tiny_model("llama")
    chain = chain_of(model, padded_ST, 4)
    states_STD = chain.passes.embedded()
    before_STD = states_STD.clone()
    found = block_influence(partition(model, by="block"), chain.passes, states_STD)
    assert found[:-1] == pytest.approx(by_transformers(model, padded_ST[:4]), rel=1e-4)
    assert torch.equal(states_STD, before_STD), "the chain starts from these"


def test_a_layer_that_does_nothing_has_none(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for matrix in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            matrix.weight.zero_()
    chain = chain_of(model, tokens_ST, 4)
    found = block_influence(partition(model, by="block"), chain.passes, chain.passes.embedded())
    assert found[1] == pytest.approx(0, abs=1e-6) and min(found[0], found[2]) > 1e-4
    assert most_alike(found, 0.34) == [1]


def test_a_share_of_the_windows_is_rounded_down_and_they_stay_in_order() -> None:
    influences = [0.3, 0.05, 0.2, 0.1, 0.4]
    assert [most_alike(influences, share) for share in (0, 0.19, 0.2, 0.5, 0.99)] == [[], [], [1], [1, 3], [0, 1, 2, 3]]
