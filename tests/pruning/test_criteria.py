"""Wanda and magnitude against references of ten lines."""

import numpy as np
import pytest
import torch
from conftest import chain_of, masks_of

from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import partition
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner, prune


def wanda_reference(weight: np.ndarray, inputs: np.ndarray, sparsity: float) -> np.ndarray:
    """Keep, in each row, the weights with the largest |W| * ||x||, by a full sort in float64."""
    scores = np.abs(weight) * np.sqrt((inputs.astype(np.float64) ** 2).sum(0))
    mask = np.ones(weight.shape, bool)
    for row, score in zip(mask, scores, strict=True):
        row[np.argsort(score)[: int(sparsity * len(score))]] = False
    return mask


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_wanda_masks_are_those_of_the_reference_on_what_each_matrix_sees(kind: str, tokens_ST: torch.Tensor) -> None:
    model = tiny_model(kind)
    first, window, _ = partition(model)
    chain = chain_of(model, tokens_ST, 4)
    chain.dense_pass(first)
    chain.advance(first)
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(matrix.name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args, name=matrix.name: inputs.update({name: args[0]})
        )
        for matrix in window.matrices()
    ]
    window(
        chain.inputs_STD[:4], chain.passes.batching.calls(torch.arange(4))
    )  # only the calibration samples, in one batch
    for hook in hooks:
        hook.remove()
    expected = {
        m.name: wanda_reference(m.by_expert(m.weight)[0].numpy(), inputs[m.name].flatten(0, 1).numpy(), 0.5)
        for m in window.matrices()
    }

    masks = masks_of(Pruner(Wanda(), Unstructured(sparsity=0.5), chain), window)
    dense = {m.name: m.weight.clone() for m in window.matrices()}
    prune(window, masks)
    for matrix in window.matrices():
        assert np.array_equal(matrix.by_expert(masks[matrix.name])[0].numpy(), expected[matrix.name]), matrix.name
        assert torch.equal(matrix.weight, dense[matrix.name] * masks[matrix.name])


def test_magnitude_scores_are_absolute_weights_and_need_no_inputs() -> None:
    weight = torch.tensor([[-3.0, 1.0], [0.5, -2.0]])
    assert Magnitude().start(weight) is None
    assert torch.equal(Magnitude().scores(weight, None), torch.tensor([[3.0, 1.0], [0.5, 2.0]]))


def test_wanda_statistics_add_up_over_batches_in_float32() -> None:
    inputs = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    statistics = Wanda().start(torch.zeros(3, 8))
    for batch in inputs.split(7):
        statistics = Wanda().update(statistics, batch)
    assert statistics.dtype == torch.float32
    torch.testing.assert_close(statistics, inputs.double().square().sum(0).float(), rtol=1e-5, atol=0)
