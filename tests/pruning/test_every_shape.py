"""Every criterion and refinement works on every shape of layers: experts, Conv1D, halves side by side, shared norms."""

from collections.abc import Callable

import pytest
import torch
from conftest import EVERY_SHAPE, chain_of
from torch import Tensor

from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import layer_windows
from lit_recon.model.verify import verify
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.criteria.random import Random
from lit_recon.pruning.criteria.ria import RIA
from lit_recon.pruning.criteria.sparsegpt import SparseGPT
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import NM, Pattern, Unstructured
from lit_recon.pruning.pruner import Pruner, prune
from lit_recon.pruning.refine import Refinement
from lit_recon.pruning.refine.dsnot import DSnoT
from lit_recon.pruning.refine.swaps import Swaps

WAYS: dict[str, tuple[Callable[[], Criterion], Pattern, Refinement | None]] = {
    "sparsegpt": (SparseGPT, Unstructured(sparsity=0.5), None),
    "sparsegpt, swaps, 2:4": (SparseGPT, NM(n=2, m=4), Swaps()),
    "wanda, swaps": (Wanda, Unstructured(sparsity=0.5), Swaps()),
    "ria, dsnot": (RIA, Unstructured(sparsity=0.5, scope="matrix"), DSnoT()),
    "random, dsnot, 2:4": (Random, NM(n=2, m=4), DSnoT()),
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_half_of_each_matrix_goes_and_what_stays_is_finite(shape: str, way: str, tokens_ST: Tensor) -> None:
    criterion, pattern, refinement = WAYS[way]
    model = tiny_model(shape)
    layers = layer_windows(model, verify(model, tokens_ST))
    pruner = Pruner(criterion(), pattern, chain_of(model, tokens_ST, 4), refinement=refinement)
    for layer in layers[:2]:
        pruner.begin(layer)
        statistics = pruner.statistics(layer)
        pruner.chain.dense_pass(layer, [statistics])
        made = pruner.decide(layer, statistics)
        pruner.chain.advance(layer)
        assert prune(layer, made.masks, made.weights)
        for matrix in (one for one in layer.matrices() if one.input_dim is not None):
            mask_EOI = matrix.by_expert(made.masks[matrix.name])
            weight_EOI = matrix.by_expert(matrix.weight)
            assert torch.isfinite(weight_EOI).all() and not weight_EOI[~mask_EOI].any(), matrix.name
            expected = mask_EOI[0].numel() // 2
            assert [int(one.sum()) for one in mask_EOI] == [expected] * len(mask_EOI), matrix.name
            if isinstance(pattern, NM):
                assert (mask_EOI.unflatten(-1, (-1, 4)).sum(-1) == 2).all(), matrix.name
        assert ("sparsegpt" in way) == bool(made.weights)
