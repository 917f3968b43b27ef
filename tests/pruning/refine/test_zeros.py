"""Weights that are zero do not come back, whatever that would do to an error."""

import pytest
import torch

from lit_recon.pruning.refine import Refinement
from lit_recon.pruning.refine.dsnot import DSnoT
from lit_recon.pruning.refine.swaps import Swaps


@pytest.mark.parametrize("width", [None, 4])
@pytest.mark.parametrize(
    "refinement", [Swaps(), Swaps(candidates=None), DSnoT(threshold=0.0)], ids=lambda one: repr(vars(one))
)
def test_zeros_stay_away_also_where_a_kept_weight_only_harms(refinement: Refinement, width: int | None) -> None:
    generator = torch.Generator().manual_seed(5)
    weight_OI = torch.randn(30, 64, generator=generator)
    shared_N1 = 2 + torch.randn(400, 1, generator=generator)
    inputs_NI = torch.randn(400, 64, generator=generator) + 2 * shared_N1  # so correlated that some weights only harm
    order = torch.rand(30, 16, 4, generator=generator).argsort(-1)
    mask_OI = (order < 2).flatten(1)
    weight_OI[~mask_OI & (torch.rand(30, 64, generator=generator) < 0.8)] = 0
    statistics = refinement.start(weight_OI)
    statistics = inputs_NI.T @ inputs_NI if statistics is None else refinement.update(statistics, inputs_NI)
    found_OI = refinement.refine(weight_OI, mask_OI, statistics, width)
    assert not (found_OI & (weight_OI == 0)).any()
    assert (found_OI & ~mask_OI).any() and torch.equal(found_OI.sum(1), mask_OI.sum(1))
