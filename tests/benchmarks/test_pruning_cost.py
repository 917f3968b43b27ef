"""What criteria and refinements cost beyond the dense pass that they share, over all layers of SmolLM2 (slow).

In the same walk the exact error of each of its 210 matrices is compared before and after swaps.
"""

import time

import pytest
import torch
from conftest import chain_of
from transformers import PreTrainedModel

from lit_recon import PythonDocs, load
from lit_recon.model.partition import partition
from lit_recon.model.windows import AnyWindow
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.criteria.random import Random
from lit_recon.pruning.criteria.ria import RIA
from lit_recon.pruning.criteria.sparsegpt import SparseGPT
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import NM, Pattern, Unstructured
from lit_recon.pruning.pruner import Pruner, Pruning
from lit_recon.pruning.refine import Refinement
from lit_recon.pruning.refine.swaps import Swaps
from lit_recon.pruning.statistics import InputStatistics

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


def errors_left(
    window: AnyWindow, masks: Pruning, refined: Pruning, statistics: InputStatistics
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Squared error of each row of the window's matrices, with masks and with refined ones, from Gram matrices."""
    found = {}
    for matrix in window.matrices():
        gram_II = statistics.for_refinement(matrix, 0)[0].double()
        found[matrix.name] = tuple(
            ((removed_OI := matrix.weight.double() * ~mask_OI) @ gram_II * removed_OI).sum(1)
            for mask_OI in (masks.masks[matrix.name], refined.masks[matrix.name])
        )
    return found


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.5), NM(n=2, m=4)], ids=str)
@torch.no_grad()
def test_pruning_costs_no_more_than_a_share_of_the_pass_that_it_shares_and_swaps_help_every_matrix(
    smollm2: tuple[PreTrainedModel, torch.Tensor], pattern: Pattern
) -> None:
    torch.set_num_threads(1)
    model, tokens_ST = smollm2
    windows = partition(model)
    chain = chain_of(model, tokens_ST, 32)
    pruners = {
        name: Pruner(criterion, pattern, chain, refinement=refinement)
        for name, (criterion, refinement, _) in LIMITS.items()
    }
    spent = dict.fromkeys(("pass", *LIMITS), 0.0)
    shares = []
    for window in windows:
        made = {}
        for name in spent:  # the same pass each time, from where the chain is
            statistics = None if name == "pass" else pruners[name].statistics(window)
            start = time.process_time()  # of this thread alone, whatever else the machine does
            chain.dense_pass(window, [] if statistics is None else [statistics])
            if statistics is not None:
                made[name] = pruners[name].decide(window, statistics)
            spent[name] += time.process_time() - start
        for name, (before_O, after_O) in errors_left(
            window, made["wanda"], made["wanda and swaps"], statistics
        ).items():
            assert (after_O <= before_O * (1 + 1e-9)).all() and after_O.sum() < before_O.sum(), name
            shares.append(float(after_O.sum() / before_O.sum()))
        chain.advance(window)
    ratios = {name: spent[name] / spent["pass"] - 1 for name in LIMITS}
    print({name: round(ratio, 3) for name, ratio in ratios.items()}, f"of {spent['pass']:.1f} s")
    print(f"swaps leave {min(shares):.3f} to {max(shares):.3f} of the errors of {len(shares)} matrices")
    assert len(shares) == 210
    assert all(ratios[name] < limit for name, (*_, limit) in LIMITS.items()), ratios
