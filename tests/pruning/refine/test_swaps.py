"""Swaps against brute force in float64, and what must hold of every refined mask."""

import math

import pytest
import torch
from torch import Tensor

from lit_recon.pruning.refine import swaps
from lit_recon.pruning.refine.swaps import Swaps


def problem(outputs: int, inputs: int, *, seed: int = 0, rows: int = 200, kept: float = 0.5) -> tuple[Tensor, ...]:
    """A weight, a random mask and the Gram matrix of inputs that are correlated and of unlike sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing_II = torch.randn(inputs, inputs, generator=generator) * torch.rand(inputs, generator=generator).exp()
    inputs_NI = torch.randn(rows, inputs, generator=generator) @ mixing_II
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    mask_OI = torch.rand(outputs, inputs, generator=generator) < kept
    return weight_OI, mask_OI, inputs_NI.T @ inputs_NI


def magnitude_mask(weight_OI: Tensor, groups: int = 1) -> Tensor:
    """Keeps the larger half of each row, or of each of its groups."""
    sizes = weight_OI.float().abs().view(-1, weight_OI.shape[1] // groups)
    return (sizes > sizes.median(1, keepdim=True).values).view(weight_OI.shape)


def error(weight_I: Tensor, mask_I: Tensor, gram_II: Tensor) -> float:
    """Squared error of one row."""
    left_out_I = (weight_I * ~mask_I).double()
    return float(left_out_I @ gram_II.double() @ left_out_I)


def errors(weight_OI: Tensor, mask_OI: Tensor, gram_II: Tensor) -> list[float]:
    return [error(weight_I, mask_I, gram_II) for weight_I, mask_I in zip(weight_OI, mask_OI, strict=True)]


def best_swap(weight_I: Tensor, mask_I: Tensor, gram_II: Tensor, width: int | None = None) -> tuple[float, Tensor]:
    """The least error of a row that one swap leads to, by trying every pair; and its mask."""
    least, best_I = math.inf, mask_I
    for u in range(len(mask_I)):
        for p in range(len(mask_I)):
            if not mask_I[u] and weight_I[u] != 0 and mask_I[p] and (width is None or u // width == p // width):
                tried_I = mask_I.clone()
                tried_I[u], tried_I[p] = True, False
                if (found := error(weight_I, tried_I, gram_II)) < least:
                    least, best_I = found, tried_I
    return least, best_I


def greedy(weight_I: Tensor, mask_I: Tensor, gram_II: Tensor, most: int, width: int | None = None) -> Tensor:
    """The mask of a row after the best swap each time, as long as one lowers the error."""
    for _ in range(most):
        least, best_I = best_swap(weight_I, mask_I, gram_II, width)
        if least >= error(weight_I, mask_I, gram_II):
            break
        mask_I = best_I
    return mask_I


@pytest.mark.parametrize("width", [None, 4])
@pytest.mark.parametrize("most", [1, 3, 100])
@pytest.mark.parametrize("seed", range(3))
def test_swaps_of_all_pairs_are_those_of_brute_force(seed: int, most: int, width: int | None) -> None:
    weight_OI, mask_OI, gram_II = problem(5, 12, seed=seed)
    refined_OI = Swaps(max_swaps=most, candidates=None).refine(weight_OI, mask_OI, gram_II, width)
    for weight_I, mask_I, refined_I in zip(weight_OI, mask_OI, refined_OI, strict=True):
        assert torch.equal(refined_I, greedy(weight_I, mask_I, gram_II, most, width))


def test_a_swap_worked_out_by_hand() -> None:
    weight_OI, mask_OI = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, False, True]])
    gram_II = torch.tensor([[1.0, 0.0, 1.0], [0.0, 4.0, 0.0], [1.0, 0.0, 2.0]])
    # pruned 1: 2^2 * 4 = 16;  pruned 0: 1 * 1 = 1;  pruned 2: 3^2 * 2 = 18
    assert errors(weight_OI, mask_OI, gram_II) == [16.0]
    assert Swaps().refine(weight_OI, mask_OI, gram_II, None).tolist() == [[False, True, True]]


@pytest.mark.parametrize("width", [None, 4, 16])
@pytest.mark.parametrize("candidates", [1, 4, 100])
def test_errors_fall_nearly_as_far_with_candidates_as_with_all_pairs(candidates: int, width: int | None) -> None:
    weight_OI, _, gram_II = problem(20, 64, rows=1000)
    mask_OI = magnitude_mask(weight_OI, 64 // width if width else 1)
    before = sum(errors(weight_OI, mask_OI, gram_II))
    fallen = [
        before - sum(errors(weight_OI, Swaps(candidates=count).refine(weight_OI, mask_OI, gram_II, width), gram_II))
        for count in (candidates, None)
    ]
    assert fallen[0] > 0.9 * fallen[1] > 0.2 * before


@pytest.mark.parametrize("width", [None, 4])
@pytest.mark.parametrize("candidates", [1, 4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_row_has_a_larger_error_and_rows_and_groups_keep_their_counts(
    dtype: torch.dtype, candidates: int | None, width: int | None
) -> None:
    for seed, kept in enumerate((0.1, 0.5, 0.9)):
        weight_OI, mask_OI, gram_II = problem(8, 32, seed=seed, kept=kept)
        weight_OI = weight_OI.to(dtype)
        given = weight_OI.clone(), mask_OI.clone(), gram_II.clone()
        refined_OI = Swaps(candidates=candidates).refine(weight_OI, mask_OI, gram_II, width)
        groups = (-1, width or 32)
        assert refined_OI.dtype == torch.bool
        assert torch.equal(refined_OI.view(groups).sum(1), mask_OI.view(groups).sum(1))
        pairs = zip(errors(weight_OI, refined_OI, gram_II), errors(weight_OI, mask_OI, gram_II), strict=True)
        for (after, before), moved in zip(pairs, (refined_OI != mask_OI).any(1), strict=True):
            assert after < before if moved else after == before
        assert all(map(torch.equal, given, (weight_OI, mask_OI, gram_II)))


def test_a_row_makes_at_most_max_swaps() -> None:
    weight_OI, _, gram_II = problem(6, 64)
    mask_OI = magnitude_mask(weight_OI)
    for most in (1, 2, 5):
        refined_OI = Swaps(max_swaps=most).refine(weight_OI, mask_OI, gram_II, None)
        assert (refined_OI & ~mask_OI).sum(1).max() == most


@pytest.mark.parametrize("width", [None, 4])
@pytest.mark.parametrize("candidates", [2, None])
def test_pruned_zeros_stay_pruned_and_kept_zeros_give_their_place_away(
    candidates: int | None, width: int | None
) -> None:
    weight_OI, _, gram_II = problem(300, 16, rows=4)  # of few rows, so that removing a weight may help by itself
    weight_OI[:, ::2] = 0
    mask_OI = torch.tensor([False, True, True, False]).repeat(300, 4)  # in each group a zero is pruned, and one is kept
    refined_OI = Swaps(candidates=candidates).refine(weight_OI, mask_OI, gram_II, width)
    assert not refined_OI[:, ::4].any()
    uncorrelated_II = torch.eye(16)  # where each kept zero is worse than each pruned weight
    refined_OI = Swaps(candidates=candidates).refine(weight_OI, mask_OI, uncorrelated_II, width)
    assert torch.equal(refined_OI, weight_OI != 0)


def test_error_that_pruned_massive_inputs_hide_is_lowered_too() -> None:
    # What is left after two inputs 30,000 times as large are restored is less than rounding of the error before.
    weight_OI, _, gram_II = problem(3, 64, rows=1000)
    scale_I = torch.ones(64)
    scale_I[[3, 40]] = 3e4
    gram_II, weight_OI[:, [3, 40]] = gram_II * scale_I * scale_I[:, None], 0.1
    mask_OI = magnitude_mask(weight_OI)
    assert not mask_OI[:, [3, 40]].any()
    refined_OI = Swaps(candidates=None).refine(weight_OI, mask_OI, gram_II, None)
    assert refined_OI[:, [3, 40]].all()
    for weight_I, refined_I in zip(weight_OI, refined_OI, strict=True):
        assert best_swap(weight_I, refined_I, gram_II)[0] > 0.999 * error(weight_I, refined_I, gram_II)


@pytest.mark.parametrize("width", [None, 4])
def test_swaps_that_raise_an_error_never_reach_the_mask(monkeypatch: pytest.MonkeyPatch, width: int | None) -> None:
    monkeypatch.setattr(swaps, "_LEAST", -1.0)  # as if rounding had hidden that they do
    weight_OI, mask_OI, gram_II = problem(15, 16)
    mask_OI = Swaps(candidates=None).refine(weight_OI, mask_OI, gram_II, width)
    refined_OI = Swaps(max_swaps=3).refine(weight_OI, mask_OI, gram_II, width)
    before, after = errors(weight_OI, mask_OI, gram_II), errors(weight_OI, refined_OI, gram_II)
    assert all(new <= old for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("candidates", [2, None])
def test_rows_in_parts_have_the_masks_of_rows_at_once(monkeypatch: pytest.MonkeyPatch, candidates: int | None) -> None:
    weight_OI, mask_OI, gram_II = problem(7, 24)
    at_once_OI = Swaps(candidates=candidates).refine(weight_OI, mask_OI, gram_II, None)
    monkeypatch.setattr(swaps, "_ELEMENTS", 2 * 24**2)
    monkeypatch.setattr(swaps, "_COLUMNS", 5)
    assert torch.equal(Swaps(candidates=candidates).refine(weight_OI, mask_OI, gram_II, None), at_once_OI)


@pytest.mark.parametrize("width", [None, 4])
def test_masks_without_a_swap_to_gain_from_stay(width: int | None) -> None:
    weight_OI, mask_OI, gram_II = problem(4, 16)
    every, none = torch.ones_like(mask_OI), torch.zeros_like(mask_OI)
    for weight, mask, gram in (
        (weight_OI, every, gram_II),
        (weight_OI, none, gram_II),
        (torch.zeros_like(weight_OI), mask_OI, gram_II),
        (weight_OI, mask_OI, torch.zeros_like(gram_II)),  # no input was ever on
        (weight_OI, mask_OI, torch.full_like(gram_II, math.nan)),
    ):
        assert torch.equal(Swaps().refine(weight, mask, gram, width), mask)


def test_dead_inputs_are_what_is_left_out() -> None:
    weight_OI, _, gram_II = problem(4, 16)
    gram_II[8:], gram_II[:, 8:] = 0, 0
    mask_OI = torch.arange(16).expand(4, 16) >= 8
    assert Swaps().refine(weight_OI, mask_OI, gram_II, None).tolist() == [[True] * 8 + [False] * 8] * 4


def test_constant_inputs_may_cancel_each_other() -> None:
    weight_OI, gram_II = torch.tensor([[1.0, 2.0, -2.0, 3.0]]), torch.full((4, 4), 100.0)  # a Gram matrix of rank one
    mask_OI = torch.tensor([[True, False, True, False]])
    refined_OI = Swaps().refine(weight_OI, mask_OI, gram_II, None)
    assert errors(weight_OI, mask_OI, gram_II) == [2500.0]  # (2 + 3)^2
    assert refined_OI.tolist() == [[True, False, False, True]]  # (2 - 2)^2


@pytest.mark.parametrize("width", [None, 4])
def test_fewer_rows_of_inputs_than_inputs_and_a_single_output(width: int | None) -> None:
    weight_OI, mask_OI, gram_II = problem(1, 24, rows=5)
    refined_OI = Swaps().refine(weight_OI, mask_OI, gram_II, width)
    assert errors(weight_OI, refined_OI, gram_II) < errors(weight_OI, mask_OI, gram_II)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3"])
def test_settings_that_are_not_numbers_from_one_on_are_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=f"refine.max_swaps={value}: expected"):
        Swaps(max_swaps=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"refine.candidates={value}: expected"):
        Swaps(candidates=value)  # type: ignore[arg-type]
