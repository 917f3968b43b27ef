"""Patterns keep exactly as many weights as they say, and the right ones."""

import numpy as np
import pytest
import torch

from lit_recon.pruning.patterns import NM, Pattern, Unstructured
from lit_recon.system.finite import NotFinite


def test_per_row_the_lowest_scores_of_each_row_go() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 8.0, 9.0]])
    expected = torch.tensor([[True, False, True, False], [False, False, True, True]])
    assert torch.equal(Unstructured(sparsity=0.5)(scores), expected)


def test_per_matrix_the_lowest_scores_of_the_whole_go() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [5.0, 6.0, 8.0, 9.0]])
    expected = torch.tensor([[False, False, False, False], [True, True, True, True]])
    assert torch.equal(Unstructured(sparsity=0.5, scope="matrix")(scores), expected)


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("scores", ["random", "equal", "few values"])
def test_the_number_of_removed_weights_is_exact_also_with_ties(sparsity: float, scores: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = {
        "random": torch.rand(7, 100, generator=generator),
        "equal": torch.ones(7, 100),
        "few values": torch.randint(0, 3, (7, 100), generator=generator).float(),
    }[scores]
    mask = Unstructured(sparsity=sparsity)(values)
    assert (~mask).sum(1).tolist() == [round(sparsity * 100)] * 7
    for row, kept in zip(values, mask, strict=True):
        if kept.any() and not kept.all():
            assert row[kept].min() >= row[~kept].max()


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("values", [2, 5, 10**6])
def test_of_equal_scores_the_first_go_as_in_a_stable_sort(values: int, scope: str) -> None:
    scores = torch.randint(0, values, (9, 64), generator=torch.Generator().manual_seed(values)).float()
    rows = scores.numpy().reshape(9 if scope == "row" else 1, -1)
    for sparsity in (0.1, 0.5, 0.9):
        expected = np.ones_like(rows, dtype=bool)
        for row, kept in zip(rows, expected, strict=True):
            kept[np.argsort(row, kind="stable")[: int(sparsity * len(row))]] = False
        assert np.array_equal(Unstructured(sparsity=sparsity, scope=scope)(scores).numpy(), expected.reshape(9, 64))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (4, 4)])
def test_n_m_keeps_exactly_the_n_best_of_every_m(n: int, m: int) -> None:
    scores = torch.randint(0, 5, (6, 32), generator=torch.Generator().manual_seed(0)).float()
    mask = NM(n=n, m=m)(scores)
    for row, kept in zip(scores.view(-1, m), mask.view(-1, m), strict=True):
        assert int(kept.sum()) == n
        assert sorted(row[kept].tolist()) == sorted(row.tolist())[m - n :]
    assert NM(n=n, m=m).sparsity == pytest.approx(1 - n / m)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_the_half_open_interval_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        Unstructured(sparsity=sparsity)


@pytest.mark.parametrize(("n", "m"), [(5, 4), (0, 4), (-1, 4)])
def test_keeping_more_than_there_are_or_nothing_is_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="0 < n <= m"):
        NM(n=n, m=m)


def test_a_width_that_m_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"pattern\.m=4 does not divide the width 30 of layers\.0\.up\.weight"):
        NM(n=2, m=4).check("layers.0.up.weight", 8, 30)


@pytest.mark.parametrize(
    "pattern", [Unstructured(sparsity=0.5), Unstructured(sparsity=0.5, scope="matrix"), NM(n=2, m=4)], ids=str
)
def test_scores_that_are_no_numbers_are_refused_where_the_count_would_be_wrong(pattern: Pattern) -> None:
    scores_OI = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    assert (~pattern(scores_OI)).sum() == 64
    scores_OI[2 if getattr(pattern, "scope", "row") == "row" else slice(None)] = float("nan")
    with pytest.raises(NotFinite, match="NaN"):
        pattern(scores_OI)


@pytest.mark.parametrize("m", [1, 2, 4, 8, 9])
def test_the_first_of_equal_scores_go_whether_pairs_are_compared_or_one_is_selected(m: int) -> None:
    scores_OI = torch.randint(0, 3, (6, 5 * m), generator=torch.Generator().manual_seed(m)).float()
    scores_OI[0, 0] = -torch.inf
    for n in range(1, m + 1):
        mask_OI = NM(n=n, m=m)(scores_OI)
        for row_I, kept_I in zip(scores_OI.tolist(), mask_OI.tolist(), strict=True):
            for start in range(0, len(row_I), m):
                lowest = sorted(range(m), key=lambda index: row_I[start + index])[: m - n]  # sorted is stable
                assert [index for index in range(m) if not kept_I[start + index]] == sorted(lowest)
