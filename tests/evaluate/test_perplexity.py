"""Perplexity, computed one layer and one slice of logits at a time, is the model's own."""

import math
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from conftest import CPU
from torch import Tensor
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel

from lit_recon.data.packing import PADDING
from lit_recon.evaluate import perplexity as evaluate
from lit_recon.evaluate.perplexity import (
    EvaluationProtocol,
    NegativeLogLikelihood,
    perplexity,
    perplexity_of,
    state_errors,
)
from lit_recon.model.architectures import tiny_model


def own_perplexity(model: PreTrainedModel, tokens_ST: Tensor, given: int = 1) -> float:
    """exp of the mean cross entropy that transformers computes for `labels`, the whole model in one piece."""
    labels_ST = tokens_ST.clone()
    labels_ST[:, :given] = PADDING
    with torch.no_grad():
        return math.exp(model(tokens_ST, labels=labels_ST, use_cache=False).loss.double().item())


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_perplexity_is_exp_of_the_models_own_mean_cross_entropy(
    model: PreTrainedModel, tokens_ST: Tensor, batch_size: int
) -> None:
    expected = own_perplexity(model, tokens_ST)
    assert perplexity(model, tokens_ST, batch_size=batch_size, compute=CPU) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "positions", [0.5, 5, 23, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 22, 24))], ids=str
)
def test_slices_of_logits_smaller_than_a_sequence_change_nothing(
    model: PreTrainedModel, tokens_ST: Tensor, monkeypatch: pytest.MonkeyPatch, positions: float
) -> None:
    monkeypatch.setattr(evaluate, "LOGITS_BYTES", int(positions * 64 * 4))  # of a vocabulary of 64, in float32
    expected = own_perplexity(model, tokens_ST)
    assert perplexity(model, tokens_ST, batch_size=4, compute=CPU) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("given", [2, 23])
def test_tokens_that_open_a_sequence_are_not_predicted(
    model: PreTrainedModel, tokens_ST: Tensor, monkeypatch: pytest.MonkeyPatch, given: int
) -> None:
    monkeypatch.setattr(evaluate, "LOGITS_BYTES", 5 * 64 * 4)
    expected = own_perplexity(model, tokens_ST, given)
    assert expected != own_perplexity(model, tokens_ST)
    assert perplexity(model, tokens_ST, given=given, batch_size=4, compute=CPU) == pytest.approx(expected, rel=1e-5)
    protocol = EvaluationProtocol.from_tokens(tokens_ST, dataset="docs", precision="32-true", given=given)
    assert protocol.tokens == len(tokens_ST) * (tokens_ST.shape[1] - given)


def test_no_slice_of_logits_is_larger_than_allowed(tokens_ST: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "LOGITS_BYTES", 5 * 64 * 4)
    model = tiny_model("llama")
    sizes: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _, __, logits_BTV: sizes.append(logits_BTV.nbytes))
    perplexity(model, tokens_ST, batch_size=4, compute=CPU)
    handle.remove()
    assert max(sizes) == 5 * 64 * 4


def test_the_metric_is_that_of_torchmetrics_and_finite_where_a_token_is_hopeless() -> None:
    logits_STV = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0))
    targets_ST = logits_STV.argmin(-1)
    metric, reference = NegativeLogLikelihood(3), Perplexity()
    for row, (logits_TV, targets_T) in enumerate(zip(logits_STV, targets_ST, strict=True)):
        for part in (slice(0, 3), slice(3, 7)):
            metric.update(row, logits_TV[part], targets_T[part])
    assert metric.compute().mean().exp().item() == pytest.approx(reference(logits_STV, targets_ST).item(), rel=1e-5)
    hopeless_V, target = torch.zeros(11), torch.tensor([0])
    hopeless_V[1] = 120
    metric.reset()
    metric.update(0, hopeless_V[None], target)
    assert metric.compute()[0].item() == 120 and reference(hopeless_V[None, None], target[None]).isinf()


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    model.lm_head.weight.zero_()
    assert perplexity(model, tokens_ST, batch_size=2, compute=CPU) == pytest.approx(64, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measuring_changes_nothing_in_the_model(model: PreTrainedModel, tokens_ST: Tensor, dtype: torch.dtype) -> None:
    model.to(dtype)
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()}
    first, second = (perplexity(model, tokens_ST, batch_size=4, compute=CPU) for _ in range(2))
    assert first == second
    assert model.dtype == dtype
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, (old_dtype, old) in before.items():
        assert after[name].dtype == old_dtype and torch.equal(after[name], old), name


def test_a_bf16_model_is_measured_with_its_layers_in_float32(tokens_ST: Tensor) -> None:
    rounded = tiny_model("llama").bfloat16()
    expected = own_perplexity(tiny_model("llama").bfloat16().float(), tokens_ST)
    measured = perplexity(rounded, tokens_ST, batch_size=4, compute=CPU)
    assert measured == pytest.approx(expected, rel=1e-2), "embeddings and head alone round to bf16"


def test_errors_of_states_are_in_units_of_the_median_energy_of_the_dense_ones_where_there_is_text() -> None:
    tokens_ST = torch.tensor([[5, 6, 7], [8, 9, PADDING]])
    dense_STD = torch.tensor([[[1e3, 0.0], [1.0, 3.0], [2.0, 2.0]], [[0.0, 4.0], [6.0, 2.0], [1e6, 1e6]]])
    states_STD = dense_STD + torch.tensor([[[0.0, 2e2], [2.0, 0.0], [0.0, 4.0]], [[2.0, 2.0], [0.0, 0.0], [-1e6, 5.0]]])
    # Energies of five tokens: 5e5 (a massive activation), 5, 4, 8, 20, the median is 8. Errors: 2e4, 2, 8, 4, 0.
    assert state_errors(states_STD, dense_STD, tokens_ST) == pytest.approx(((2e4 + 14) / 5 / 8, 4 / 8))


def test_a_massive_activation_does_not_decide_the_errors_of_states() -> None:
    dense_STD = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(0))
    tokens_ST, states_STD = torch.zeros(2, 32, dtype=torch.long), 1.1 * dense_STD
    usual = state_errors(states_STD, dense_STD, tokens_ST)
    dense_STD[:, 0, 3] = states_STD[:, 0, 3] = 1e4  # which both models have
    assert state_errors(states_STD, dense_STD, tokens_ST) == pytest.approx(usual, rel=0.1)


def test_the_protocol_is_told_in_one_line_and_in_full() -> None:
    protocol = EvaluationProtocol(
        dataset="docs", split="evaluation", context=5, windows=3, tokens=12, precision="32-true"
    )
    for part in ("docs", "evaluation", "3 sequences of 5 tokens", "12 predicted", "32-true"):
        assert part in protocol.describe()
    assert asdict(protocol) == {
        "dataset": "docs",
        "split": "evaluation",
        "context": 5,
        "windows": 3,
        "tokens": 12,
        "precision": "32-true",
        "opening": "none",
        "opening_at": "window",
        "stride": None,
    }
    assert "each after" not in protocol.describe()
    assert "3 sequences of 5 tokens, each after <s>, 12" in replace(protocol, opening="<s>").describe()


def test_a_protocol_names_the_split_once() -> None:
    tokens_ST = torch.zeros(3, 5, dtype=torch.long)
    made = partial(EvaluationProtocol.from_tokens, tokens_ST, precision="32-true")
    assert made(dataset="docs").describe().startswith("docs (evaluation), 3 seq")
    assert made(dataset="org/name raw test", split="test").describe().startswith("org/name raw test, 3 seq")
    papers = replace(made(dataset="docs", opening="<s>"), opening_at="text")
    assert "of 5 tokens, the text after <s>, 12" in papers.describe()


def test_a_hopeless_token_does_not_make_the_perplexity_infinite(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    model.lm_head.weight.mul_(100)  # log(softmax) is minus infinity in float32 from 104 nats on
    with torch.no_grad():
        logits_BTV = model(tokens_ST, use_cache=False).logits[:, :-1].double()
    chosen_BT1 = logits_BTV.log_softmax(-1).gather(2, tokens_ST[:, 1:, None])
    assert chosen_BT1.min() < -200
    expected = math.exp(-chosen_BT1.mean().item())
    assert perplexity(model, tokens_ST, batch_size=4, compute=CPU) == pytest.approx(expected, rel=1e-3)


def test_a_perplexity_beyond_the_largest_number_is_infinite_and_of_nan_nan() -> None:
    assert perplexity_of(700) == math.exp(700) and perplexity_of(710) == math.inf
    assert math.isnan(perplexity_of(math.nan)) and perplexity_of(math.inf) == math.inf
