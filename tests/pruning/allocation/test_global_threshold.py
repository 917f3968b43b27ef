"""One threshold over many matrices selects what a sort of all scores would, to the last score."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lit_recon.pruning.allocation.global_threshold import PIECE, GlobalThreshold, sparsity_of
from lit_recon.pruning.patterns import Unstructured, num_removed
from lit_recon.system.finite import NotFinite

SHAPES = {"a": (7, 100), "b": (30, 31), "c": (1, 1), "d": (3, 20, 11)}


def _removed(matrices: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    threshold = GlobalThreshold(sparsity)
    for name, scores in matrices.items():
        threshold.count(name, scores)
    for name, scores in reversed(matrices.items()):
        threshold.locate(name, scores)
    removed = threshold.removed()
    assert sum(removed.values()) == threshold.selected
    return removed


def _by_sorting(matrices: Mapping[str, Tensor], count: int) -> dict[str, int]:
    """The same by a stable sort of all scores one after the other, by which ties go to the first."""
    scores = torch.cat([one.float().flatten() for one in matrices.values()])
    owners = torch.cat([torch.full((one.numel(),), index) for index, one in enumerate(matrices.values())])
    lowest = owners[scores.sort(stable=True).indices[:count]]
    return dict(zip(matrices, torch.bincount(lowest, minlength=len(matrices)).tolist(), strict=True))


def _scores(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=generator)
    signs = torch.randint(-1, 2, shape, generator=generator).float()
    return {
        "normal": normal,
        "positive, over many magnitudes": (normal * 30).exp(),
        "few values, with both zeros": signs * torch.tensor(0.0 if shape == SHAPES["b"] else 1.0),
        "equal": torch.full(shape, -2.5),
        "in one bin": 1 + normal.abs() * 1e-4,
        "denormal": normal * 1e-40,
        "largest": signs * torch.finfo(torch.float32).max,
        "with -inf": torch.where(normal > 0, -math.inf, normal),
        "with inf": torch.where(normal > 0, math.inf, normal),
    }[kind]


@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.29, 0.5, 0.7, 0.999])
@pytest.mark.parametrize(
    "kind",
    [
        "normal",
        "positive, over many magnitudes",
        "few values, with both zeros",
        "equal",
        "in one bin",
        "denormal",
        "largest",
        "with -inf",
        "with inf",
    ],
)
def test_as_many_scores_of_each_matrix_are_selected_as_a_sort_of_all_would(kind: str, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = {name: _scores(kind, shape, generator) for name, shape in SHAPES.items()}
    num_scores = 700 + 930 + 1 + 660
    assert _removed(matrices, sparsity) == _by_sorting(matrices, math.floor(sparsity * num_scores))


def test_ties_go_to_the_matrices_that_were_counted_first() -> None:
    matrices = {
        name: torch.tensor(scores) for name, scores in {"a": [1.0, 3.0], "b": [1.0, 1.0, 0.0], "c": [1.0]}.items()
    }
    assert _removed(matrices, 3 / 6) == {"a": 1, "b": 2, "c": 0}


def test_positive_and_negative_zero_are_equal() -> None:
    matrices = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([-0.0, 1.0])}
    assert _removed(matrices, 1 / 4) == {"a": 1, "b": 0}


def test_scores_of_more_than_one_piece_and_of_several_calls_are_added_up() -> None:
    generator = torch.Generator().manual_seed(0)
    large, other = torch.randn(2 * PIECE + 17, generator=generator), torch.randn(1000, generator=generator) - 1
    threshold = GlobalThreshold(0.5)
    for visit in (threshold.count, threshold.locate):
        visit("large", large[:1000])
        visit("other", other)
        visit("large", large[1000:])
    assert threshold.removed() == _by_sorting({"large": large, "other": other}, (2 * PIECE + 1017) // 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shorter_floats_and_transposed_views_are_taken_as_they_are(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = {name: torch.randn(40, 30, generator=generator).to(dtype).mT for name in "abc"}
    assert _removed(matrices, 0.6) == _by_sorting(matrices, 2160)


@pytest.mark.parametrize(
    ("sparsity", "num_scores", "expected"), [(0.29, 100, 29), (0.58, 50, 29), (0.5, 7, 3), (0.0, 9, 0)]
)
def test_the_number_selected_is_rounded_down_but_not_by_what_a_product_lacks(
    sparsity: float, num_scores: int, expected: int
) -> None:
    assert _removed({"a": torch.arange(num_scores).float()}, sparsity) == {"a": expected}


def test_scores_that_are_no_numbers_are_refused_by_the_name_of_their_matrix() -> None:
    threshold = GlobalThreshold(0.5)
    with pytest.raises(NotFinite, match=r"up\.weight: scores are not numbers"):
        threshold.count("up.weight", torch.tensor([1.0, float("nan"), 2.0]))


def test_a_second_pass_over_other_scores_is_noticed() -> None:
    threshold = GlobalThreshold(0.5)
    threshold.count("a", torch.tensor([1.0, 2.0, 3.0]))
    threshold.locate("a", torch.tensor([4.0, 5.0, 6.0]))
    with pytest.raises(AssertionError, match="other scores"):
        threshold.removed()


def test_matrices_that_are_missing_in_the_second_pass_are_noticed() -> None:
    threshold = GlobalThreshold(0.5)
    threshold.count("a", torch.tensor([1.0, 2.0]))
    threshold.count("b", torch.tensor([1.0, 2.0]))
    threshold.locate("a", torch.tensor([1.0, 2.0]))
    with pytest.raises(AssertionError, match="not all matrices were located"):
        threshold.removed()


def test_a_pattern_removes_exactly_the_number_found() -> None:
    scores_OI = torch.rand(6, 50, generator=torch.Generator().manual_seed(0))
    for removed in range(301):
        pattern = Unstructured(sparsity=sparsity_of(removed, 300), scope="matrix")
        assert int((~pattern(scores_OI)).sum()) == removed


@pytest.mark.parametrize("size", [1, 3, 576 * 1536, 136_134_656])
def test_the_sparsity_of_a_number_gives_that_number_also_in_large_matrices(size: int) -> None:
    for removed in {0, size // 7, size // 3, size // 2, size - 1, size}:
        sparsity = sparsity_of(removed, size)
        assert 0 <= sparsity < 1
        assert num_removed(sparsity, size) == removed
