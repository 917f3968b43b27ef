"""Losses are what their formulas say, by hand; their gradients, and those of the module, are finite differences."""

from collections.abc import Callable
from functools import partial
from math import sqrt

import pytest
import torch
from conftest import CPU
from torch import Tensor

from lit_recon.activations.datamodule import Batch
from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import Decoder
from lit_recon.model.partition import partition
from lit_recon.modules.losses import after_first, balanced, cosine, huber, mean_squared, relative
from lit_recon.modules.masked_weights import MaskedWeights

OUTPUTS_ND = torch.tensor([[1.0, 2.0], [0.0, 3.0], [3.0, 4.0]])
TARGETS_ND = torch.tensor([[4.0, 1.0], [0.0, 0.0], [3.0, 4.0]])  # squared errors 5, 4.5 and 0
ENERGIES_N, UNIT = torch.tensor([1.0, 100.0, 4.0]), 4.0
BY_HAND = {
    mean_squared: [5 / 4, 4.5 / 4, 0],
    balanced: [5 / 4, 4.5 / sqrt(4 * 100), 0],  # a token with less energy than the unit counts as in the mean
    relative: [5 / 8.5, 4.5 / (1e-6 * 4), 0],  # the second target has no energy
    cosine: [1 - 6 / sqrt(5 * 17), 1, 0],
    huber: [2 * (sqrt(1 + 5 / 4) - 1), 2 * (sqrt(1 + 4.5 / 4) - 1), 0],
    partial(huber, delta=0.5): [0.5 * (sqrt(1 + 5) - 1), 0.5 * (sqrt(1 + 4.5) - 1), 0],
    partial(huber, delta=1e3): [5 / 4, 4.5 / 4, 0],
}


def name(value: object) -> str | None:
    """Of a loss, for the name of a test."""
    return getattr(value, "__name__", str(getattr(value, "keywords", ""))) if callable(value) else None


@pytest.mark.parametrize("loss", BY_HAND, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_of_each_token_is_that_computed_by_hand_also_of_16_bits(loss: Callable, dtype: torch.dtype) -> None:
    found_N = loss(OUTPUTS_ND.to(dtype), TARGETS_ND, energies_N=ENERGIES_N, unit=UNIT)
    assert found_N.dtype == torch.float32
    assert found_N.tolist() == pytest.approx(BY_HAND[loss], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", BY_HAND, ids=name)
def test_the_gradient_of_each_loss_is_that_of_finite_differences(loss: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs_ND, targets_ND = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    energies_N = torch.tensor([0.1, 0.3, 0.5, 2.0, 1e3], dtype=torch.float64)
    outputs_ND.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda one: loss(one, targets_ND, energies_N=energies_N, unit=0.5), outputs_ND)


def test_a_bend_of_the_huber_loss_that_is_not_above_0_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\.delta=0: expected a number above 0"):
        huber(OUTPUTS_ND, TARGETS_ND, energies_N=ENERGIES_N, unit=UNIT, delta=0)


@pytest.fixture
def pruned() -> tuple[object, dict[str, Tensor], Batch]:
    """A window in float64, but for norms and angles, with masked weights, its masks and a batch towards its outputs."""
    model = tiny_model("llama").double()
    window, generator = partition(model)[0], torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(3, 64, (2, 7), generator=generator)
    inputs_BTD, calls = Decoder(model, CPU.device).embed(tokens_BT)
    inputs_BTD = inputs_BTD.double()
    targets_BTD = window(inputs_BTD, calls).detach()
    masks = {one.name: torch.rand(one.weight.shape, generator=generator) < 0.5 for one in window.matrices()}
    for matrix in window.matrices():
        matrix.weight.data.mul_(masks[matrix.name])
    energies_BT = (targets_BTD - inputs_BTD).square().mean(-1)
    return window, masks, Batch(inputs_BTD, targets_BTD, calls, energies_BT, weight=0.75)


@pytest.mark.filterwarnings("ignore:.*self.trainer. reference is not registered")
@pytest.mark.parametrize(
    "settings",
    [{}, {"loss": balanced}, {"loss": relative}, {"loss": cosine}, {"loss": partial(huber, delta=0.1)}]
    + [{"anchor": 3.0}, {"token_weights": partial(after_first, positions=2)}],
    ids=lambda settings: " ".join([*settings, name(settings.get("loss")) or ""]).strip(),
)
def test_the_modules_gradient_is_that_of_finite_differences_and_exactly_zero_where_the_mask_is(
    pruned: tuple, settings: dict
) -> None:
    window, masks, batch = pruned
    module = MaskedWeights(window, masks, batch.energies_BT.median().item(), **settings)
    module.on_train_start()
    parameters, generator = module.trained(), torch.Generator().manual_seed(1)
    window.requires_grad_(True)
    start = [parameter.detach().clone() for parameter in parameters]
    by_matrix = {id(matrix.weight): masks[matrix.name] for matrix in window.matrices()}
    directions = [torch.randn(one.shape, generator=generator, dtype=one.dtype) for one in parameters]
    directions = [one * by_matrix.get(id(p), 1) for one, p in zip(directions, parameters, strict=True)]

    def loss(step: float) -> Tensor:
        with torch.no_grad():
            for parameter, begin, direction in zip(parameters, start, directions, strict=True):
                parameter.copy_(begin + (0.01 + step) * direction)  # away from where the pull has no gradient
        return module.training_step(batch, 0)

    step = 1e-3
    expected = (loss(step) - loss(-step)).item() / (2 * step)
    loss(0.0).backward()
    module.on_before_optimizer_step(None)
    found = sum((one.grad * direction).sum() for one, direction in zip(parameters, directions, strict=True))
    assert found.item() == pytest.approx(expected, rel=1e-4) and abs(expected) > 1e-2
    for matrix in window.matrices():
        assert torch.count_nonzero(matrix.weight.grad[~masks[matrix.name]]) == 0
        assert torch.count_nonzero(matrix.weight.grad[masks[matrix.name]]) > 0


def test_the_first_positions_of_each_sample_can_be_left_out(pruned: tuple) -> None:
    window, masks, batch = pruned
    whole_BT = MaskedWeights(window, masks, 1.0).losses(batch).view(2, 7)
    weighted_BT = MaskedWeights(window, masks, 1.0, token_weights=partial(after_first, positions=2)).losses(batch)
    assert torch.count_nonzero(weighted_BT.view(2, 7)[:, :2]) == 0 and torch.all(whole_BT > 0)
    assert torch.equal(weighted_BT.view(2, 7)[:, 2:], whole_BT[:, 2:])


def test_a_loss_that_takes_a_mean_over_tokens_is_refused(pruned: tuple) -> None:
    window, masks, batch = pruned
    module = MaskedWeights(window, masks, 1.0, loss=lambda outputs, targets, **_: (outputs - targets).square().mean())
    with pytest.raises(ValueError, match=r"loss: expected one number for each of 14 tokens.* the shape \(\)"):
        module.losses(batch)


@pytest.mark.filterwarnings("ignore:.*self.trainer. reference is not registered")
@pytest.mark.parametrize("anchor", [0.1, 10.0])
def test_an_anchor_moves_the_optimum_to_where_the_normal_equations_say(anchor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    window = partition(tiny_model("llama").double(), by="matrix")[0]
    window.open()
    weight_OI, unit = window.weight.data.double(), 2.0
    window.weight.data = weight_OI
    inputs_NI = torch.randn(64, weight_OI.shape[1], generator=generator, dtype=torch.float64)
    targets_NO = inputs_NI @ weight_OI.T
    mask_OI = torch.rand(weight_OI.shape, generator=generator) < 0.5
    start_OI = weight_OI * mask_OI
    window.weight.data = start_OI.clone()
    batch = Batch(inputs_NI[None], targets_NO[None], [], torch.ones(1, 64, dtype=torch.float64))
    module = MaskedWeights(window, {window.matrix.name: mask_OI}, unit, anchor=anchor, loss=mean_squared)
    module.on_train_start()
    share, pull = 1 / (targets_NO.numel() * unit), anchor / start_OI.square().sum()
    for row, kept in enumerate(mask_OI):
        inputs = inputs_NI[:, kept]
        system = share * inputs.T @ inputs + pull * torch.eye(inputs.shape[1], dtype=torch.float64)
        right = share * inputs.T @ targets_NO[:, row] + pull * start_OI[row, kept]
        window.weight.data[row, kept] = torch.linalg.solve(system, right)
    assert (window.weight - start_OI).norm() > 1e-3 * start_OI.norm()
    window.requires_grad_(True)
    (gradient_OI,) = torch.autograd.grad(module.training_step(batch, 0), window.weight)
    (alone_OI,) = torch.autograd.grad(module.losses(batch).mean(), window.weight)
    assert (gradient_OI * mask_OI).norm() < 1e-9 * (alone_OI * mask_OI).norm(), "the pull is what holds it there"
