"""What criteria and refinements cost beyond the dense pass that they share, over all layers of SmolLM2 (slow)."""

import time

import pytest
import torch
from conftest import chain_of
from transformers import PreTrainedModel

from lit_recon import PythonDocs, load
from lit_recon.model.partition import partition
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.criteria.random import Random
from lit_recon.pruning.criteria.ria import RIA
from lit_recon.pruning.criteria.sparsegpt import SparseGPT
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner
from lit_recon.pruning.refine import Refinement
from lit_recon.pruning.refine.swaps import Swaps

LIMITS: dict[str, tuple[Criterion, Refinement | None, float]] = {  # of the dense pass
    "magnitude": (Magnitude(), None, 0.1),
    "random": (Random(), None, 0.1),
    "wanda": (Wanda(), None, 0.1),
    "ria": (RIA(), None, 0.1),
    "sparsegpt": (SparseGPT(), None, 1.0),
    "wanda and swaps": (Wanda(), Swaps(), 3.0),
}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, torch.Tensor]:
    """SmolLM2 in float32, and 36 samples of 256 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LIT_RECON_CACHE", raising=False)  # the user's own
        model, tokenizer = load("smollm2")
    samples = PythonDocs(num_samples=32, length=256).samples(tokenizer)
    return model, torch.cat([samples.calibration_ST, samples.held_out_ST])


@pytest.mark.slow
@pytest.mark.smollm2
@torch.no_grad()
def test_pruning_costs_no_more_than_a_share_of_the_pass_that_it_shares(
    smollm2: tuple[PreTrainedModel, torch.Tensor],
) -> None:
    torch.set_num_threads(1)
    model, tokens_ST = smollm2
    windows = partition(model)
    chain = chain_of(model, tokens_ST, 32)
    pruners = {
        name: Pruner(criterion, Unstructured(sparsity=0.5), chain, refinement=refinement)
        for name, (criterion, refinement, _) in LIMITS.items()
    }
    spent = dict.fromkeys(("pass", *LIMITS), 0.0)
    for window in windows:
        for name in spent:  # the same pass each time, from where the chain is
            statistics = None if name == "pass" else pruners[name].statistics(window)
            start = time.process_time()  # of this thread alone, whatever else the machine does
            chain.dense_pass(window, [] if statistics is None else [statistics])
            if statistics is not None:
                pruners[name].decide(window, statistics)
            spent[name] += time.process_time() - start
        chain.advance(window)
    ratios = {name: spent[name] / spent["pass"] - 1 for name in LIMITS}
    print({name: round(ratio, 3) for name, ratio in ratios.items()}, f"of {spent['pass']:.1f} s")
    assert all(ratios[name] < limit for name, (*_, limit) in LIMITS.items()), ratios
