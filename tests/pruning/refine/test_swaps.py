"""Swaps are the best there are, lower each row's exact error, and keep the counts of rows and groups."""

from itertools import product

import pytest
import torch
from torch import Tensor

from lit_recon.pruning.refine.swaps import Swaps


def drawn(seed: int, outputs: int = 5, inputs: int = 12, rows: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a mask of half of each group of four, and a Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    inputs_NI = torch.randn(rows, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    order = torch.rand(outputs, inputs // 4, 4, generator=generator).argsort(-1)
    return weight_OI, (order < 2).flatten(1), inputs_NI.T @ inputs_NI


def errors(weight_OI: Tensor, mask_OI: Tensor, gram_II: Tensor) -> Tensor:
    """The squared error of each row, in float64."""
    left_OI = weight_OI.double() * ~mask_OI
    return ((left_OI @ gram_II.double()) * left_OI).sum(1)


def best_swap(weight_I: Tensor, mask_I: Tensor, gram_II: Tensor, width: int) -> Tensor:
    """The mask with the least error among that of a row and all that differ from it by one swap, each tried."""
    best = mask_I
    for one, other in product(range(len(mask_I)), repeat=2):
        if mask_I[one] and not mask_I[other] and one // width == other // width:
            swapped = mask_I.clone()
            swapped[one], swapped[other] = False, True
            found, least = (float(errors(weight_I[None], mask[None], gram_II)) for mask in (swapped, best))
            best = swapped if found < least else best
    return best


@pytest.mark.parametrize("width", [None, 4])
@pytest.mark.parametrize("seed", range(4))
def test_one_swap_is_the_best_of_all(seed: int, width: int | None) -> None:
    weight_OI, mask_OI, gram_II = drawn(seed)
    found_OI = Swaps(max_swaps=1, candidates=None).refine(weight_OI, mask_OI, gram_II, width)
    expected = [best_swap(*row, gram_II, width or 12) for row in zip(weight_OI, mask_OI, strict=True)]
    assert torch.equal(found_OI, torch.stack(expected)) and (found_OI != mask_OI).any()


@pytest.mark.parametrize("candidates", [None, 8, 1])
@pytest.mark.parametrize("width", [None, 4])
def test_no_row_gets_worse_and_counts_of_rows_and_groups_stay(width: int | None, candidates: int | None) -> None:
    weight_OI, mask_OI, gram_II = drawn(9, outputs=30, inputs=64)
    found_OI = Swaps(candidates=candidates).refine(weight_OI, mask_OI, gram_II, width)
    before_O, after_O = (errors(weight_OI, one, gram_II) for one in (mask_OI, found_OI))
    assert (after_O <= before_O).all() and after_O.sum() < 0.6 * before_O.sum()
    groups = (16, 4) if width else (1, 64)
    assert torch.equal(found_OI.unflatten(1, groups).sum(-1), mask_OI.unflatten(1, groups).sum(-1))


def test_with_all_pairs_no_swap_is_left_that_helps() -> None:
    weight_OI, mask_OI, gram_II = drawn(2)
    found_OI = Swaps(candidates=None).refine(weight_OI, mask_OI, gram_II, None)
    for row in zip(weight_OI, found_OI, strict=True):
        better = errors(row[0][None], best_swap(*row, gram_II, 12)[None], gram_II)
        assert better >= errors(row[0][None], row[1][None], gram_II) * (1 - 1e-4)


def test_few_candidates_come_close_to_all_pairs() -> None:
    weight_OI, mask_OI, gram_II = drawn(4, outputs=30, inputs=64, rows=400)
    few, all_pairs = (
        errors(weight_OI, Swaps(candidates=one).refine(weight_OI, mask_OI, gram_II, None), gram_II).sum()
        for one in (8, None)
    )
    assert few < 1.15 * all_pairs


@pytest.mark.parametrize(
    "case", ["zeros", "dead inputs", "singular", "sink", "all kept", "all pruned", "one row", "bf16"]
)
def test_odd_matrices_end_in_masks_with_the_same_counts_and_no_higher_error(case: str) -> None:
    weight_OI, mask_OI, gram_II = drawn(3, outputs=1 if case == "one row" else 6, rows=3 if case == "singular" else 40)
    if case == "zeros":
        weight_OI.zero_()
    if case == "dead inputs":
        gram_II[::3] = gram_II[:, ::3] = 0
    if case == "sink":
        gram_II[2] *= 1e5
        gram_II[:, 2] *= 1e5
    if case.startswith("all"):
        mask_OI[:] = case == "all kept"
    if case == "bf16":
        weight_OI = weight_OI.bfloat16()
    found_OI = Swaps().refine(weight_OI, mask_OI, gram_II, None)
    assert found_OI.dtype == torch.bool and torch.equal(found_OI.sum(1), mask_OI.sum(1))
    assert (errors(weight_OI, found_OI, gram_II) <= errors(weight_OI, mask_OI, gram_II)).all()


def test_zeros_do_not_come_back() -> None:
    weight_OI, mask_OI, gram_II = drawn(5, outputs=30, inputs=64)
    weight_OI[~mask_OI & (torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(1)) < 0.5)] = 0
    found_OI = Swaps().refine(weight_OI, mask_OI, gram_II, None)
    assert not (found_OI & ~mask_OI & (weight_OI == 0)).any() and (found_OI & ~mask_OI).any()


@pytest.mark.parametrize(("settings", "said"), [({"max_swaps": 0}, "max_swaps=0"), ({"candidates": 0}, "candidates=0")])
def test_settings_out_of_range_are_refused(settings: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=f"refine.{said}"):
        Swaps(**settings)
