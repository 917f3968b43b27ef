"""Orders of hidden channels: they change no model, and keep nearly what the best order keeps."""

import itertools

import pytest
import torch
from conftest import chain_of
from torch import Tensor

from lit_recon.model.architectures import tiny_model
from lit_recon.model.matrices import Matrix
from lit_recon.model.partition import layer_windows
from lit_recon.pruning.criteria.ria import RIA
from lit_recon.pruning.patterns import NM
from lit_recon.pruning.permutation import Order, best_order, hidden_channels, kept_score
from lit_recon.pruning.pruner import Pruner, prune

GATED = ("llama", "qwen2", "gemma3", "phi3")


def random_scores(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(outputs, inputs, generator=generator) ** 4 * torch.rand(inputs, generator=generator)


def most_kept(scores_OI: Tensor, n: int, m: int) -> float:
    """What the best of all orders keeps, tried one after the other."""
    inputs = range(scores_OI.shape[1])
    return max(float(kept_score(scores_OI[:, list(order)], n, m)) for order in itertools.permutations(inputs))


def test_kept_score_by_hand() -> None:
    scores_OI = torch.tensor([[4.0, 3, 2, 1], [1, 5, 0, 2]])
    assert float(kept_score(scores_OI, 1, 2)) == (4 + 2) + (5 + 2)
    assert float(kept_score(scores_OI, 2, 4)) == (4 + 3) + (5 + 2)


def test_large_scores_that_share_a_group_are_put_into_different_groups() -> None:
    scores_OI = torch.tensor([[9.0, 8, 7, 6, 0, 0, 0, 0]])
    order_I = best_order(scores_OI, 2, 4)
    assert sorted(order_I.tolist()) == list(range(8))
    assert float(kept_score(scores_OI[:, order_I], 2, 4)) == 30 > float(kept_score(scores_OI, 2, 4)) == 17


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 3)])
def test_nearly_as_much_is_kept_as_by_the_best_of_all_orders_of_six_channels(n: int, m: int, seed: int) -> None:
    scores_OI = random_scores(5, 6, seed)
    kept = float(kept_score(scores_OI[:, best_order(scores_OI, n, m)], n, m))
    now = float(kept_score(scores_OI, n, m))
    best = most_kept(scores_OI, n, m)
    assert now <= kept <= best and kept >= 0.96 * best


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4)])
def test_more_is_kept_than_without_an_order_of_96_channels(n: int, m: int) -> None:
    scores_OI = random_scores(40, 96)
    order_I = best_order(scores_OI, n, m)
    assert sorted(order_I.tolist()) == list(range(96))
    assert kept_score(scores_OI[:, order_I], n, m) > kept_score(scores_OI, n, m)


def test_the_order_stays_where_no_other_is_better() -> None:
    scores_OI = torch.ones(3, 8)
    assert best_order(scores_OI, 2, 4).tolist() == list(range(8))
    assert best_order(random_scores(3, 8), 4, 4).tolist() == list(range(8))


def test_outputs_of_fused_matrices_are_put_into_one_order_each() -> None:
    matrix_OI = torch.arange(6.0)[:, None]  # two matrices of three outputs
    order = Order(torch.tensor([2, 0, 1]), of_inputs=False)
    assert order(matrix_OI).flatten().tolist() == [2, 0, 1, 5, 3, 4]


@pytest.mark.parametrize("name", GATED)
def test_hidden_channels_are_found_and_attention_is_not_taken_for_them(name: str) -> None:
    for window in layer_windows(tiny_model(name)):
        (channels,) = hidden_channels(window)
        assert "down" in channels.out.name and all("up" in one.name or "gate" in one.name for one in channels.into)


def test_channels_with_biases_or_norms_of_their_own_are_left_where_they_are() -> None:
    model = tiny_model("gpt2")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    assert not [one for window in layer_windows(model) for one in hidden_channels(window)]


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("kind", ["block", "half"])
@torch.no_grad()
def test_only_what_is_pruned_changes_the_model(name: str, kind: str) -> None:
    """With all weights of down kept in the end, the reordered model is the dense one; and its masks are 2:4."""
    model = tiny_model(name)
    tokens_ST = torch.randint(3, 64, (5, 24), generator=torch.Generator().manual_seed(1))
    dense = model(tokens_ST, use_cache=False).logits
    chain = chain_of(model, tokens_ST, 3)
    pruner = Pruner(RIA(permute=True), NM(n=2, m=4), chain)
    moved = 0
    for window in layer_windows(model, by=kind):
        pruner.begin(window)
        statistics = pruner.statistics(window)
        chain.dense_pass(window, [statistics])
        decided = pruner.decide(window, statistics)
        before = {one.name: one.weight.clone() for one in window.matrices()}
        for matrix in window.matrices():
            mask_OI = matrix.by_expert(decided.masks[matrix.name])[0]
            assert (mask_OI.unflatten(1, (-1, 4)).sum(2) == 2).all()
            moved += matrix.name in decided.weights
        prune(window, {name: torch.ones_like(mask) for name, mask in decided.masks.items()}, decided.weights)
        torch.testing.assert_close(model(tokens_ST, use_cache=False).logits, dense, rtol=1e-4, atol=1e-4)
        assert all(not torch.equal(before[name], weight) for name, weight in decided.weights.items())
        chain.advance(window)
    assert moved >= 2 * model.config.num_hidden_layers


def test_the_mask_of_down_keeps_more_of_the_scores_than_without_an_order() -> None:
    model = tiny_model("llama")
    tokens_ST = torch.randint(3, 64, (5, 24), generator=torch.Generator().manual_seed(1))
    kept = {}
    for permute in (False, True):
        chain = chain_of(model, tokens_ST, 3)
        pruner = Pruner(RIA(permute=permute), NM(n=2, m=4), chain)
        window = layer_windows(model)[0]
        pruner.begin(window)
        statistics = pruner.statistics(window)
        chain.dense_pass(window, [statistics])
        decided = pruner.decide(window, statistics)
        (down,) = (one for one in window.matrices() if "down" in one.name)
        kept[permute] = score_of(down, decided.masks[down.name], decided.weights.get(down.name), statistics)
    assert kept[True] > kept[False]


def score_of(down: Matrix, mask: Tensor, weight: Tensor | None, statistics: object) -> float:
    """Scores that a mask keeps; channels of a reordered weight are found again by their columns."""
    scores_OI = RIA().scores(down.weight, statistics.for_criterion(down, 0)[0])  # type: ignore[attr-defined]
    if weight is not None:
        places = [int((down.weight == column[:, None]).all(0).nonzero()[0]) for column in weight.T]
        scores_OI = scores_OI[:, places]
    return float(scores_OI[mask].sum())
