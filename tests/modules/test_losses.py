"""The loss on the logits is the divergence that its formula says, in slices as well as at once."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import CPU, chain_of, fitter, masks_of, module
from torch import Tensor

from lit_recon.activations.datamodule import Activations
from lit_recon.data.packing import PADDING
from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import Decoder
from lit_recon.model.head import SLICE, kl_divergence_sum
from lit_recon.model.partition import partition
from lit_recon.modules.losses import kl_divergence, mean_squared
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner, prune


@pytest.fixture
def tokens_ST() -> Tensor:
    """Six samples of more than a slice of tokens together."""
    return torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(1))


def divergence(logits_BTV: Tensor, expected_BTV: Tensor) -> Tensor:
    """Sum over tokens of sum p (log p - log q), p of the expected logits; in float64."""
    p, q = expected_BTV.double().softmax(-1), logits_BTV.double().softmax(-1)
    return (p * (p.log() - q.log())).sum()


@pytest.mark.parametrize("tokens", [1, SLICE - 1, SLICE, SLICE + 1, 3 * SLICE + 7])
def test_the_divergence_and_its_gradient_are_those_computed_at_once(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(50, 8, generator=generator).requires_grad_(True)
    outputs_BTD, targets_BTD = (torch.randn(2, tokens, 8, generator=generator) for _ in range(2))
    outputs_BTD.requires_grad_(True)

    def head(hidden_BTD: Tensor) -> Tensor:
        assert hidden_BTD.shape[0] == 1 and hidden_BTD.shape[1] <= SLICE, "a slice at a time"
        return hidden_BTD @ weight_VD.T

    expected = divergence(outputs_BTD @ weight_VD.T, (targets_BTD @ weight_VD.T).detach())
    total = kl_divergence_sum(outputs_BTD, targets_BTD, head=head)
    mean = kl_divergence(outputs_BTD, targets_BTD, variance=123.0, head=head)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert mean.item() == pytest.approx(expected.item() / (2 * tokens), rel=1e-5)
    for gradients in zip(
        torch.autograd.grad(mean, [outputs_BTD, weight_VD]),
        torch.autograd.grad(expected / (2 * tokens), [outputs_BTD, weight_VD]),
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
        for parameter in window.trained():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    window.requires_grad_(True)
    loss = kl_divergence(window(hidden_BTD, calls), targets_BTD, variance=1.0, head=window.head)
    expected = divergence(model(tokens_ST, use_cache=False).logits, expected_BTV) / tokens_ST.numel()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and loss > 1e-5
    parameters = window.trained()
    gradients = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6


def test_the_divergence_of_equal_outputs_is_zero() -> None:
    outputs_ND = torch.randn(100, 8)
    assert kl_divergence_sum(outputs_ND, outputs_ND, head=lambda hidden: hidden).item() == pytest.approx(0, abs=1e-5)


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

    def held_out() -> float:
        text_BT = text_ST[32:]
        return (divergence(model(**inputs).logits[32:][text_BT], dense_STV[32:][text_BT]) / text_BT.sum()).item()

    before = held_out()
    result = fitter(tmp_path, module(), max_epochs=10).fit(window, masks, Activations.from_chain(chain))
    assert result.measure == "KL divergence" and result.accepted
    assert result.held_out_before == pytest.approx(before, rel=1e-4)
    assert result.held_out_after == pytest.approx(held_out(), rel=1e-4)
    assert result.held_out_after < 0.9 * before
    assert result.relative_error_after < 0.9 * result.relative_error_before


def test_squared_errors_are_in_units_of_the_variance() -> None:
    outputs_BTD, targets_BTD = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[4.0, 1.0]]])
    assert mean_squared(outputs_BTD, targets_BTD, variance=4.0).item() == pytest.approx((9 + 1) / 2 / 4)
