"""Criteria that change weights, refinements and patterns of single matrices: what stays is what they say, exactly."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import CPU, chain_of, module, trainer
from torch import Tensor

from lit_recon.activations import gram
from lit_recon.activations.propagation import Propagation
from lit_recon.model.architectures import tiny_model
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import partition
from lit_recon.model.windows import Window
from lit_recon.modules.untrained import Untrained
from lit_recon.pruning.criteria import Pruned
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import NM, Choice, Chooser, Unstructured
from lit_recon.pruning.pruner import Pruner, Pruning
from lit_recon.reconstruction.driver import WalkCallback, walk
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.reconstruction.window_fit import WindowFitter

TOKENS_ST = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(1))
HALF = Unstructured(sparsity=0.5)


class Doubling(Magnitude):
    """Keeps the weights with the largest energy of their inputs, twice as large."""

    needs_gram = True

    def scores(self, weight_OI: Tensor, statistics: Any) -> Tensor:
        return statistics.diagonal().expand_as(weight_OI)

    def prune(self, weight_OI: Tensor, statistics: Tensor, choose: Chooser) -> Pruned:
        half = weight_OI.shape[1] // 2
        parts = [(self.scores(weight_OI, statistics)[:, start : start + half], start) for start in (0, half)]
        mask_OI = torch.cat([choose(*part) for part in parts], dim=1)
        return Pruned(mask_OI, 2 * weight_OI * mask_OI)


class Hopeless(Doubling):
    """Finds no solution."""

    def prune(self, weight_OI: Tensor, statistics: Tensor, choose: Chooser) -> Pruned:
        raise torch.linalg.LinAlgError("not positive definite")


class KeepsFirst(Magnitude):
    """Refines a mask to the first weights of each row, as many as there were."""

    def refine(self, weight_OI: Tensor, mask_OI: Tensor, statistics: None, width: int | None) -> Tensor:
        assert statistics is None
        return torch.arange(mask_OI.shape[1]) < mask_OI.sum(1, keepdim=True)


def decided(pruner: Pruner, windows: Sequence[Window]) -> Pruning:
    """What stays of some windows, of which none is pruned."""
    made = Pruning()
    for window in windows:
        pruner.begin(window)
        statistics = pruner.statistics(window)
        pruner.chain.dense_pass(window, [statistics])
        made.add(pruner.decide(window, statistics))
        pruner.chain.advance(window)
    return made


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_masks_of_some_columns_at_a_time_drop_as_many_weights_as_one_mask(scope: str) -> None:
    pattern = Unstructured(sparsity=0.3, scope=scope)
    scores_OI = torch.rand(7, 23, generator=torch.Generator().manual_seed(1)) + 0.1
    choose = Choice(pattern, scores_OI)
    for width in (1, 4, 8, 22):
        parts = [choose(scores_OI[:, start : start + width], start) for start in range(0, 23, width)]
        dropped = ~torch.cat(parts, dim=1)
        assert int(dropped.sum()) == (7 * 6 if scope == "row" else 48)  # floor(0.3 * 23) a row, floor(0.3 * 161)
        assert scope == "matrix" or set(dropped.sum(1).tolist()) == {6}


def test_zeros_are_the_first_to_go_and_never_stay() -> None:
    weight_OI = torch.ones(2, 8)
    weight_OI[0, :6] = 0
    assert Choice(HALF, weight_OI)(torch.ones(2, 8)).sum(1).tolist() == [2, 4]
    assert Choice(NM(n=2, m=4), weight_OI)(torch.ones(2, 8)).tolist()[0] == [False] * 6 + [True] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_a_criterion_changes_stand_in_the_window_as_they_will_be_stored(dtype: torch.dtype) -> None:
    class Seen(WalkCallback):
        pruned: dict[str, Tensor] = {}

        def on_window_pruned(self, window: Window, pruned: Pruning) -> None:
            assert {one.dtype for one in pruned.weights.values()} == {dtype}
            self.pruned |= pruned.weights

    model, dense = tiny_model("gpt2").to(dtype), tiny_model("gpt2").to(dtype)
    chain, seen = chain_of(model, TOKENS_ST, 4), Seen()
    windows = partition(model)
    walk(
        windows,
        chain=chain,
        pruner=Pruner(Doubling(), HALF, chain),
        fitter=WindowFitter(Untrained, trainer(), device=CPU.device, seed=0, fitting=FitSettings(retry_rates=())),
        weights=WeightOffloader(model, CPU.device),
        callbacks=[seen],
    )
    for window in windows:
        for matrix in window.matrices():
            before, after = dense.get_parameter(matrix.name), model.get_parameter(matrix.name)
            kept = after != 0
            assert int(kept.sum()) == kept.numel() // 2, matrix.name
            assert torch.equal(after, 2 * before * kept), matrix.name
            assert torch.equal(seen.pruned[matrix.name], after), matrix.name


def test_single_matrices_start_from_the_weights_that_a_criterion_has_changed() -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    chain = chain_of(model, TOKENS_ST, 4)
    walk(
        partition(model, by="matrix")[:7],
        chain=chain,
        pruner=Pruner(Doubling(), HALF, chain),
        fitter=WindowFitter(Untrained, trainer(), device=CPU.device, seed=0, fitting=FitSettings(retry_rates=())),
        weights=WeightOffloader(model, CPU.device),
    )
    for matrix in partition(model)[0].matrices():
        after = model.get_parameter(matrix.name)
        assert torch.equal(after, 2 * dense.get_parameter(matrix.name) * (after != 0)), matrix.name


@pytest.mark.parametrize("statistics", ["dense", "sparse"])
def test_a_window_of_several_layers_has_the_gram_matrices_of_one_layer_at_a_time(
    statistics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = {"now": 0, "most": 0}

    class Counted(gram.GramSums):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            alive["now"] += 1
            alive["most"] = max(alive.values())

        def __del__(self) -> None:
            alive["now"] -= 1

    monkeypatch.setattr(gram, "GramSums", Counted)
    made = []
    for settings in ({"by": "block"}, {"by": "blocks", "size": 2}, {"by": "model"}):
        model = tiny_model("llama")
        chain = chain_of(model, TOKENS_ST, 4, propagation=Propagation(inputs="dense", statistics=statistics))
        made.append(decided(Pruner(Doubling(), HALF, chain), partition(model, **settings)))
    assert alive["most"] == 4, "q with k and v, o, gate with up, down"
    for other in made[1:]:
        assert other.masks.keys() == made[0].masks.keys() == other.weights.keys()
        for name, mask in made[0].masks.items():
            assert torch.equal(other.masks[name], mask), name
            assert torch.equal(other.weights[name], made[0].weights[name]), name


@pytest.mark.parametrize("by", ["block", "matrix"])
def test_gram_matrices_of_the_same_inputs_are_summed_once_for_pruning_and_for_solving(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Counted(gram.GramSums):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            made.append(self)

    monkeypatch.setattr(gram, "GramSums", Counted)
    model = tiny_model("llama")
    chain = chain_of(model, TOKENS_ST, 4)
    settings = FitSettings(start="least_squares", retry_rates=())
    walk(
        partition(model, by=by)[: 7 if by == "matrix" else 1],
        chain=chain,
        pruner=Pruner(Doubling(), HALF, chain),
        fitter=WindowFitter(module(lr=1e-4), trainer(), device=CPU.device, seed=0, fitting=settings),
        weights=WeightOffloader(model, CPU.device),
    )
    assert len(made) == 4


def test_what_cannot_be_solved_for_is_pruned_by_wanda_and_named(caplog: pytest.LogCaptureFixture) -> None:
    made = {}
    with caplog.at_level(logging.WARNING):
        for criterion in (Hopeless(), Wanda()):
            model = tiny_model("llama")
            pruner = Pruner(criterion, HALF, chain_of(model, TOKENS_ST, 4))
            made[type(criterion)] = decided(pruner, partition(model)[:1])
            names = [matrix.name for matrix in partition(model)[0].matrices()]
            assert pruner.labels("wanda") == (names if isinstance(criterion, Hopeless) else [])
    assert f"{names[0]}: its Gram matrix has no Cholesky factor" in caplog.text
    assert not made[Hopeless].weights
    for name, mask in made[Wanda].masks.items():
        assert (made[Hopeless].masks[name] == mask).float().mean() > 0.999, name  # sums in another order


def test_a_refined_mask_gets_the_weights_that_the_criterion_makes_for_it() -> None:
    for criterion in (Magnitude(), Doubling()):
        model = tiny_model("llama")
        windows = partition(model)[:1]
        pruner = Pruner(criterion, HALF, chain_of(model, TOKENS_ST, 4), refinement=KeepsFirst())
        made = decided(pruner, windows)
        for matrix in windows[0].matrices():
            expected = torch.arange(matrix.weight.shape[1]).expand_as(matrix.weight) < matrix.weight.shape[1] // 2
            assert torch.equal(made.masks[matrix.name], expected)
            if isinstance(criterion, Doubling):
                assert torch.equal(made.weights[matrix.name], 2 * matrix.weight * expected)
            else:
                assert not made.weights


def test_each_matrix_may_have_a_pattern_of_its_own() -> None:
    model = tiny_model("llama")
    windows = partition(model)[:1]
    first, second, third, *_ = (matrix.name for matrix in windows[0].matrices())
    patterns = {first: [NM(n=1, m=4)], second: [Unstructured(sparsity=0)]}
    pruner = Pruner(Wanda(), HALF, chain_of(model, TOKENS_ST, 4), patterns=patterns)
    masks = decided(pruner, windows).masks
    assert (masks[first].unflatten(1, (-1, 4)).sum(-1) == 1).all()
    assert masks[second].all()
    assert masks[third].float().mean() == 0.5
