"""Low-rank changes under the mask: their formulas, their merging, and that nothing of them stays behind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import chain_of, fitter, masks_of, module, pruned_window, weights
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_recon.activations.datamodule import Activations
from lit_recon.activations.matrix_inputs import MatrixInputs
from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import partition
from lit_recon.model.windows import AnyWindow
from lit_recon.modules.mask_lora import MaskLora
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner, prune

VARIANTS = ("mask", "spp", "hadamard", "lora_then_mask")


def window_of(shape: str, by: str, tokens_ST: Tensor) -> tuple[AnyWindow, dict[str, Tensor], Tensor, list]:
    """The first window of a kind, pruned; its masks, inputs and calls."""
    model = tiny_model(shape)
    chain = chain_of(model, tokens_ST, 4)
    window = partition(model, by=by)[-1 if by == "matrix" else 0]
    layer = window.enclosing
    masks = masks_of(Pruner(Magnitude(), Unstructured(sparsity=0.5), chain), layer)
    data = MatrixInputs(layer, chain).activations(window) if by == "matrix" else Activations.from_chain(chain)
    if by == "matrix":
        window.open()
    prune(window, masks)
    batch = next(data.batches(0, 2))
    return window, {one.name: masks[one.name] for one in window.matrices()}, batch.inputs_BTD, batch.calls


def moved(made: MaskLora) -> MaskLora:
    """With changes that are not zero, as after training."""
    generator = torch.Generator().manual_seed(3)
    for parameter in made.adapters.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def formula(
    variant: str, weight: np.ndarray, mask: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float
) -> np.ndarray:
    """The changed weight (O, I), as the papers have it."""
    if variant == "spp":  # W + s * W * repeat(A, O / r) * column
        repeated = np.repeat(a, len(weight) // len(a), axis=0)
        return weight + scale * weight * repeated * b
    return {
        "mask": weight + scale * mask * (b @ a),
        "hadamard": weight * (b @ a),
        "lora_then_mask": weight + scale * (b @ a),
    }[variant]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_each_variant_computes_its_formula_and_is_merged_with_exact_zeros(
    tokens_ST: Tensor, shape: str, variant: str
) -> None:
    window, masks, _, _ = window_of(shape, "block", tokens_ST)
    made = moved(MaskLora(window, masks, 1.0, rank=4, alpha=6.0, variant=variant))
    before = [matrix.weight.clone() for matrix in window.matrices()]
    with made.attached():
        used = [adapter(weight) for adapter, weight in zip(made.adapters, before, strict=True)]
    for matrix, adapter, start, while_trained in zip(window.matrices(), made.adapters, before, used, strict=True):
        weight_EOI, mask_EOI, used_EOI, merged_EOI = (
            matrix.by_expert(one.detach()).double().numpy()
            for one in (start, masks[matrix.name], while_trained, matrix.weight)
        )
        pairs = zip(adapter.A_ERI.detach().double().numpy(), adapter.B_EOR.detach().double().numpy(), strict=True)
        for expert, (a, b) in enumerate(pairs):
            expected = formula(variant, weight_EOI[expert], mask_EOI[expert], a, b, 6.0 / 4)
            np.testing.assert_allclose(used_EOI[expert], expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(merged_EOI[expert], expected * mask_EOI[expert], rtol=1e-5, atol=1e-6)
        assert torch.count_nonzero(matrix.weight[~masks[matrix.name]]) == 0
        assert torch.count_nonzero(matrix.weight != start) > 0.4 * start.numel()


@pytest.mark.parametrize("variant", VARIANTS)
def test_changes_begin_as_none(tokens_ST: Tensor, variant: str) -> None:
    window, masks, _, _ = window_of("llama", "block", tokens_ST)
    before = weights(window)
    with MaskLora(window, masks, 1.0, rank=4, variant=variant).attached():
        pass
    for name, parameter in window.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("shape", "by"),
    [
        ("llama", "block"),
        ("llama", "half"),
        ("llama", "matrix"),
        ("gpt2", "block"),
        ("mixtral", "block"),
        ("mixtral", "matrix"),
    ],
)
def test_merged_weights_compute_what_the_changes_did_and_nothing_else_stays(
    tokens_ST: Tensor, shape: str, by: str
) -> None:
    window, masks, inputs_BTD, calls = window_of(shape, by, tokens_ST)
    parameters = [(name, id(one)) for owner in window.owners() for name, one in owner.named_parameters()]
    classes = [type(one) for owner in window.owners() for one in owner.modules()]
    state = [list(owner.state_dict()) for owner in window.owners()]
    made = moved(MaskLora(window, masks, 1.0, rank=4))
    pruned_BTD = window(inputs_BTD, calls)
    with made.attached():
        expected_BTD = window(inputs_BTD, calls).detach()
    found_BTD = window(inputs_BTD, calls)
    assert (expected_BTD - pruned_BTD).norm() > 1e-2 * expected_BTD.norm(), "the changes matter"
    assert (found_BTD - expected_BTD).norm() <= 1e-6 * expected_BTD.norm()
    assert [(name, id(one)) for owner in window.owners() for name, one in owner.named_parameters()] == parameters
    assert [type(one) for owner in window.owners() for one in owner.modules()] == classes
    assert [list(owner.state_dict()) for owner in window.owners()] == state
    for matrix in window.matrices():
        assert torch.equal(matrix.weight != 0, masks[matrix.name])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_fit_leaves_the_pruned_window(tokens_ST: Tensor, stop: type[BaseException]) -> None:
    window, masks, _, _ = window_of("gpt2", "block", tokens_ST)
    before, classes = weights(window), [type(one) for one in window.modules()]
    with pytest.raises(stop), moved(MaskLora(window, masks, 1.0, rank=4)).attached():
        raise stop
    assert list(weights(window)) == list(before)
    assert all(torch.equal(parameter, before[name]) for name, parameter in window.named_parameters())
    assert [type(one) for one in window.modules()] == classes


@pytest.mark.parametrize("shape", ["llama", "mixtral"])
def test_gradients_are_the_same_where_a_layer_is_run_again_in_the_backward(tokens_ST: Tensor, shape: str) -> None:
    window, masks, inputs_BTD, calls = window_of(shape, "block", tokens_ST)
    made = moved(MaskLora(window, masks, 1.0, rank=4))
    found = []
    with made.attached():
        for parameter in made.trained():
            parameter.requires_grad_(True)
        for run in (window, lambda *given: checkpoint(window, *given, use_reentrant=False)):
            found.append(torch.autograd.grad(run(inputs_BTD, calls).square().mean(), made.trained()))
    for kept, again in zip(*found, strict=True):
        assert torch.equal(kept, again) and torch.count_nonzero(kept)


def test_what_is_drawn_depends_on_the_seed_alone(tokens_ST: Tensor) -> None:
    window, masks, _, _ = window_of("llama", "block", tokens_ST)
    drawn = []
    for seed, before in ((5, 0), (5, 3), (6, 0)):
        torch.manual_seed(seed)
        torch.rand(before)
        drawn.append(torch.cat([one.A_ERI.flatten() for one in MaskLora(window, masks, 1.0, rank=4).adapters]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_window_is_reconstructed_with_its_zeros_at_every_rank_and_what_is_asked_for_is_trained(
    tokens_ST: Tensor, tmp_path: Path, variant: str
) -> None:
    data, window, masks = pruned_window(tiny_model("gpt2"), tokens_ST)
    before = weights(window)
    make = module(cls=MaskLora, rank=4, alpha=8.0, variant=variant, train_norms=False)
    result = fitter(tmp_path, make).fit(window, masks, data)
    assert result.accepted and result.held_out_after < 0.95 * result.held_out_before
    for matrix in window.matrices():
        assert torch.equal(matrix.weight != 0, masks[matrix.name])
    for name, parameter in window.named_parameters():
        assert torch.equal(parameter, before[name]) == ("ln_" in name), name
        assert parameter.grad is None and not parameter.requires_grad


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rank": 0}, "module.rank=0: expected a whole number"),
        ({"rank": True}, "module.rank=True"),
        ({"alpha": -1}, "module.alpha=-1: expected a number above 0"),
        ({"variant": "other"}, "module.variant=other: expected one of mask, spp, hadamard, lora_then_mask"),
    ],
)
def test_settings_out_of_range_are_refused(tokens_ST: Tensor, settings: dict, told: str) -> None:
    window, masks, _, _ = window_of("llama", "block", tokens_ST)
    with pytest.raises(ValueError, match=told):
        MaskLora(window, masks, 1.0, **settings)
