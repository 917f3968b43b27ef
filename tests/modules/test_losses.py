"""Losses are what their formulas say, token by token; that on the logits in slices as well as at once."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, chain_of, fitter, masks_of, module
from torch import Tensor

from lit_recon.activations.datamodule import Activations
from lit_recon.data.packing import PADDING
from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import Decoder
from lit_recon.model.errors import unit_of
from lit_recon.model.head import SLICE, slice_tokens
from lit_recon.model.partition import partition
from lit_recon.modules.losses import balanced, cosine, huber, kl_divergence, mean_squared, relative
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner, prune


@pytest.fixture
def tokens_ST() -> Tensor:
    """Six samples of more than a slice of tokens together."""
    return torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(1))


def divergences(logits: Tensor, expected: Tensor) -> Tensor:
    """sum p (log p - log q) of each token, p of the expected logits; in float64."""
    p, q = expected.double().softmax(-1), logits.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("tokens", [1, SLICE - 1, SLICE, SLICE + 1, 3 * SLICE + 7])
def test_the_divergence_and_its_gradient_are_those_computed_at_once(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(50, 8, generator=generator).requires_grad_(True)
    outputs_ND, targets_ND = (torch.randn(tokens, 8, generator=generator) for _ in range(2))
    outputs_ND.requires_grad_(True)

    def head(hidden_BTD: Tensor) -> Tensor:
        assert hidden_BTD.shape[0] == 1 and hidden_BTD.shape[1] <= SLICE, "a slice at a time"
        return hidden_BTD @ weight_VD.T

    expected_N = divergences(outputs_ND @ weight_VD.T, (targets_ND @ weight_VD.T).detach())
    found_N = kl_divergence(outputs_ND, targets_ND, energies_N=torch.full((tokens,), 9.0), unit=123.0, head=head)
    torch.testing.assert_close(found_N.double(), expected_N, rtol=1e-4, atol=1e-6)
    for gradients in zip(
        torch.autograd.grad(found_N.mean(), [outputs_ND, weight_VD]),
        torch.autograd.grad(expected_N.mean(), [outputs_ND, weight_VD]),
        strict=True,
    ):
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", ["llama", "gemma2", "cohere2", "opt_post_norm", "gpt2"])
def test_the_divergence_of_a_model_is_that_of_its_own_logits(shape: str, tokens_ST: Tensor) -> None:
    model = tiny_model(shape)
    (window,) = partition(model, by="model", head=True)
    assert window.head is not None
    decoder = Decoder(model, CPU.device)
    hidden_BTD, calls = decoder.embed(tokens_ST)
    targets_BTD = window(hidden_BTD, calls)
    expected_BTV = model(tokens_ST, use_cache=False).logits
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in window.own_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    window.requires_grad_(True)
    outputs_ND, targets_ND = (states_BTD.flatten(0, 1) for states_BTD in (window(hidden_BTD, calls), targets_BTD))
    energies_N = torch.ones(tokens_ST.numel())
    loss = kl_divergence(outputs_ND, targets_ND, energies_N=energies_N, unit=1.0, head=window.head).mean()
    expected = divergences(model(tokens_ST, use_cache=False).logits, expected_BTV).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and loss > 1e-5
    parameters = window.own_parameters()
    gradients = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6


def test_the_divergence_of_equal_outputs_is_zero() -> None:
    outputs_ND, ones_N = torch.randn(100, 8), torch.ones(100)
    found_N = kl_divergence(outputs_ND, outputs_ND, energies_N=ones_N, unit=1.0, head=lambda hidden: hidden)
    torch.testing.assert_close(found_N, torch.zeros(100), rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{"by": "model"}, {"by": "block"}, {"by": "half"}], ids=str)
def test_the_last_window_alone_has_a_head(settings: dict) -> None:
    windows = partition(tiny_model("llama"), **settings, head=True)
    assert [window.head is not None for window in windows] == [False] * (len(windows) - 1) + [True]
    assert all(window.head is None for window in partition(tiny_model("llama"), **settings))


@pytest.mark.parametrize("shape", ["phi", "gpt_neox", "cohere2"])
def test_halves_that_stand_side_by_side_have_no_head(shape: str) -> None:
    with pytest.raises(ValueError, match=r"windows.head=true with windows=half.*side by side.*use block"):
        partition(tiny_model(shape), by="half", head=True)
    assert partition(tiny_model(shape), by="block", head=True)[-1].head


@pytest.mark.parametrize(
    ("shape", "is_padded"),
    [
        ("llama", True),
        ("mixtral", False),
        pytest.param("llama", False, marks=pytest.mark.slow),
        pytest.param("mixtral", True, marks=pytest.mark.slow),
    ],
)
def test_a_head_on_a_run_over_the_model_lowers_the_divergence_that_is_measured(
    shape: str, is_padded: bool, tmp_path: Path
) -> None:
    tokens_ST = torch.randint(3, 64, (36, 24), generator=torch.Generator().manual_seed(1))
    if is_padded:
        tokens_ST[::3, 17:], tokens_ST[35, 7:] = PADDING, PADDING
    text_ST = tokens_ST != PADDING
    inputs = {"input_ids": tokens_ST.where(text_ST, 0), "attention_mask": text_ST.long(), "use_cache": False}
    model = tiny_model(shape)
    dense_STV = copy.deepcopy(model)(**inputs).logits
    (window,) = partition(model, by="model", head=True)
    chain = chain_of(model, tokens_ST, 32, batch_size=4)
    masks = masks_of(Pruner(Wanda(), Unstructured(sparsity=0.5), chain), window)
    prune(window, masks)

    def held_out() -> tuple[float, float]:
        text_BT = text_ST[32:]
        found_N = divergences(model(**inputs).logits[32:][text_BT], dense_STV[32:][text_BT])
        return found_N.mean().item(), found_N.median().item()

    before = held_out()
    result = fitter(tmp_path, module(), max_epochs=10).fit(window, masks, Activations.from_chain(chain))
    assert result.measure == "KL divergence" and result.accepted
    assert (result.held_out_before, result.typical_before) == pytest.approx(before, rel=1e-4)
    assert (result.held_out_after, result.typical_after) == pytest.approx(held_out(), rel=1e-4)
    assert result.held_out_after < 0.9 * before[0]
    assert result.relative_error_after < 0.9 * result.relative_error_before


def by_formula(name: str, output_D: np.ndarray, target_D: np.ndarray, energy: float, unit: float) -> float:
    """The loss of one token, in plain NumPy."""
    error = np.mean((output_D - target_D) ** 2)
    if name == "cosine":
        return 1 - output_D @ target_D / np.sqrt((output_D @ output_D) * (target_D @ target_D))
    return {
        "mean_squared": error / unit,
        "balanced": error / np.sqrt(unit * max(unit, energy)),
        "relative": error / np.mean(target_D**2),
        "huber": 2 * 0.5**2 * (np.sqrt(1 + error / unit / 0.5**2) - 1),
    }[name]


LOSSES = {loss.__name__: loss for loss in (mean_squared, balanced, relative, cosine)}
LOSSES["huber"] = partial(huber, delta=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_its_formula_for_each_token_with_the_gradient_of_finite_differences(
    name: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs_ND, targets_ND = (torch.randn(6, 7, generator=generator) * 3 for _ in range(2))
    energies_N = torch.tensor([1e8, 40.0, 2.5, 1.0, 1e-3, 0.0])  # a massive activation; larger, equal, smaller; none
    given_ND = outputs_ND.to(dtype).requires_grad_(True)  # in 16 bits as under autocast
    found_N = LOSSES[name](given_ND, targets_ND, energies_N=energies_N, unit=2.5)
    assert found_N.shape == (6,) and found_N.dtype == torch.float32
    output, target = given_ND.detach().double().numpy(), targets_ND.double().numpy()
    tokens = zip(output, target, energies_N.tolist(), strict=True)
    expected = [by_formula(name, *token, 2.5) for token in tokens]
    assert found_N.tolist() == pytest.approx(expected, rel=1e-5)
    if dtype == torch.bfloat16:
        return
    (gradient_ND,) = torch.autograd.grad(found_N.sum(), given_ND)
    for row, energy in enumerate(energies_N.tolist()):
        for feature in range(7):
            step = np.zeros(7)
            step[feature] = 1e-5
            ends = (by_formula(name, output[row] + sign * step, target[row], energy, 2.5) for sign in (1, -1))
            slope = (next(ends) - next(ends)) / 2e-5
            assert gradient_ND[row, feature].item() == pytest.approx(slope, rel=1e-3, abs=1e-9), (row, feature)


def test_a_target_of_zeros_has_a_finite_relative_loss() -> None:
    found_N = relative(torch.ones(1, 4), torch.zeros(1, 4), energies_N=torch.ones(1), unit=2.0)
    assert found_N.item() == pytest.approx(1 / (1e-6 * 2))


def test_leaving_a_window_out_costs_a_typical_token_exactly_one() -> None:
    inputs_ND = torch.randn(31, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1])
    updates_ND = torch.randn(31, 3, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, 4, 31)[:, None]
    energies_N = updates_ND.square().mean(-1)
    unit = unit_of(energies_N)
    assert unit == sorted(energies_N.tolist())[15]
    losses_N = mean_squared(inputs_ND, inputs_ND + updates_ND, energies_N=energies_N, unit=unit)
    assert np.median(losses_N) == pytest.approx(1, rel=1e-4)


def test_slices_of_logits_are_of_bytes_on_a_gpu_and_of_few_tokens_elsewhere() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert slice_tokens(32768, gpu) == 2**28 // (4 * 32768) == 2048
    assert slice_tokens(2**24, gpu) == slice_tokens(32768, cpu) == SLICE
