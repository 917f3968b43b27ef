"""A pass runs a module over all samples, and has the next batch fetched while one is run."""

import pytest
import torch
from torch import Tensor
from walks import LENGTH, SAMPLES, WatchedStore, chain_in

from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import layer_windows


@pytest.fixture
def tokens_ST() -> Tensor:
    """Three calibration and two held-out samples: not a multiple of the batch of two."""
    return torch.randint(3, 64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


def test_the_next_batch_of_a_pass_is_prefetched_before_one_is_run(tokens_ST: Tensor) -> None:
    store = WatchedStore()
    model = tiny_model("llama")
    chain = chain_in(model, tokens_ST, store=store)
    window = layer_windows(model)[0]
    store.told.clear()
    window.register_forward_pre_hook(lambda _, args: store.told.append(("run", [len(args[0])])))
    chain.passes.run(window, chain.inputs_STD, None)
    assert [entry for entry in store.told if entry[0] != "release"] == [
        ("prefetch", [2, 3]),
        ("run", [2]),
        ("prefetch", [3, 4]),
        ("run", [1]),
        ("run", [2]),
    ]
