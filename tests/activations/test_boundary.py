"""States at a window boundary: named, not copied, and refused where they are another chain's."""

import pytest
import torch
from torch import Tensor
from walks import LENGTH, PROPAGATIONS, SAMPLES, Walk, chain_in

from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import MemoryStore
from lit_recon.model.architectures import tiny_model


@pytest.fixture
def tokens_ST() -> Tensor:
    """Three calibration and two held-out samples: not a multiple of the batch of two."""
    return torch.randint(3, 64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


def test_the_state_is_named_and_not_copied(tokens_ST: Tensor) -> None:
    walk = Walk("parallel halves", tokens_ST, PROPAGATIONS[1])
    names = []
    for position in range(2):
        walk.start(position)
        state = walk.end(position)
        names.append(sorted(state))
        assert state["dense"] is walk.chain.dense.states_STD and state["sparse"] is walk.chain.sparse.states_STD
    assert names == [["dense", "dense_aside", "sparse", "sparse_aside"], ["dense", "sparse"]]


def test_another_chains_state_is_refused_with_both(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    state = chain_in(model, tokens_ST, Propagation(inputs="dense")).state()
    with pytest.raises(
        ValueError, match=r"the dense chain, .* they are the dense and sparse chain, 5 x 12 x 32 float32"
    ):
        chain_in(model, tokens_ST, PROPAGATIONS[1]).restore(state)
    with pytest.raises(ValueError, match=r"5 x 12 x 32 float32, .* 5 x 12 x 32 bfloat16; resume with .*store\.dtype"):
        chain_in(model, tokens_ST, store=MemoryStore(torch.bfloat16)).restore(state)
    with pytest.raises(ValueError, match="5 x 12 x 32 .* 4 x 12 x 32"):
        chain_in(model, tokens_ST[:4]).restore(state)
