"""Zeros of one matrix: by hand, and against a count that goes through every group in turn."""

import pytest
import torch
from torch import Tensor

from lit_recon.verify import zeros
from lit_recon.verify.zeros import CANDIDATES, Pattern, look_at, strongest


def names(patterns: object) -> str:
    return " ".join(map(str, patterns))


def most_in_a_group(weight_OI: Tensor, size: int) -> list[int]:
    """Weights that are not zero, of every group in turn."""
    rows = weight_OI.float().tolist()
    return [
        sum(value != 0 for value in row[start : start + size]) for row in rows for start in range(0, len(row), size)
    ]


def random_matrix(*shape: int, sparsity: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) >= sparsity)


def test_zeros_and_patterns_of_a_matrix_by_hand() -> None:
    weight_OI = torch.tensor([[1.0, 0, 0, 2, 0, 3, 4, 0], [0, 0, 5, 0, 0, 0, 0, 0]])
    found = look_at(weight_OI, 1)
    assert (found.weights, found.zeros) == (16, 11)
    assert set(names(found.patterns).split()) == {"1:2", "2:4", "3:4", "4:8", "6:8"}
    assert names(strongest(found.patterns)) == "1:2"
    assert (found.groups, found.over, found.masked, found.masked_nonzero) == (None, None, None, None)


def test_one_weight_too_many_in_one_group_breaks_a_pattern_there() -> None:
    weight_OI = torch.tensor([[1.0, 2, 0, 0]]).repeat(6, 5)
    assert (look_at(weight_OI, 1, asked=Pattern(2, 4)).groups, look_at(weight_OI, 1, asked=Pattern(2, 4)).over) == (
        30,
        0,
    )
    assert Pattern(2, 4) in look_at(weight_OI, 1).patterns
    weight_OI[3, 10] = 1e-30
    found = look_at(weight_OI, 1, asked=Pattern(2, 4))
    assert (found.groups, found.over) == (30, 1)
    assert Pattern(2, 4) not in found.patterns and Pattern(3, 4) in found.patterns


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(7, 48), (3, 20), (5, 9), (1, 32)], ids=str)
def test_patterns_are_those_of_a_count_of_every_group(
    shape: tuple[int, int], sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zeros, "CHUNK", 64)  # a few rows at a time
    weight_OI = random_matrix(*shape, sparsity=sparsity)
    expected = {
        str(pattern)
        for pattern in CANDIDATES
        if shape[1] % pattern.m == 0 and max(most_in_a_group(weight_OI, pattern.m)) <= pattern.n
    }
    asked = Pattern(2, 3)
    found = look_at(weight_OI, 1, asked=asked)
    assert set(names(found.patterns).split()) == expected
    assert found.zeros == int((weight_OI == 0).sum())
    if shape[1] % 3:
        assert found.over is None and found.groups is None
    else:
        counts = most_in_a_group(weight_OI, 3)
        assert (found.groups, found.over) == (len(counts), sum(count > 2 for count in counts))


def test_groups_run_along_the_inputs_of_every_layout() -> None:
    weight_OI = random_matrix(6, 16, sparsity=0.2) * torch.tensor([1.0, 0, 1, 0]).repeat(4)
    weight_EOI = torch.stack([weight_OI, weight_OI])
    asked = Pattern(2, 4)
    for weight, input_dim in ((weight_OI, 1), (weight_OI.T.contiguous(), 0), (weight_EOI, 1), (weight_EOI.mT, 0)):
        assert look_at(weight, input_dim, asked=asked).over == 0
        assert Pattern(1, 2) in look_at(weight, input_dim).patterns
    wide_OI = random_matrix(16, 16, sparsity=0.0) * torch.tensor([1.0, 0, 1, 0]).repeat(4)
    assert look_at(wide_OI, 1, asked=asked).over == 0
    assert look_at(wide_OI, 0, asked=asked).over == 8 * 4
    assert look_at(wide_OI, None, asked=asked).over == 0, "either will do where the layout is not known"
    assert look_at(wide_OI.T, None, asked=asked).over == 0
    assert Pattern(1, 2) in look_at(wide_OI.T, None).patterns


@pytest.mark.parametrize("input_dim", [0, 1, None])
def test_masked_weights_that_are_not_zero_are_counted(input_dim: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeros, "CHUNK", 8)
    weight = torch.ones(3, 4, 8)
    mask = torch.ones(3, 4, 8, dtype=torch.bool)
    mask[0, 0], mask[2, :, 1] = False, False
    weight[~mask] = 0
    found = look_at(weight, input_dim, mask=mask)
    assert (found.masked, found.masked_nonzero, found.zeros) == (12, 0, 12)
    weight[2, 3, 1], weight[0, 0, 0], weight[1, 1, 1] = 1e-20, float("nan"), 0.0
    found = look_at(weight, input_dim, mask=mask)
    assert (found.masked, found.masked_nonzero, found.zeros) == (12, 2, 11)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8],
    ids=str,
)
def test_zero_is_zero_of_either_sign_in_every_dtype(dtype: torch.dtype) -> None:
    weight_OI = torch.tensor([[0.0, -0.0, 1.0, -2.0]]).to(dtype)
    found = look_at(weight_OI, 1, asked=Pattern(2, 4), mask=torch.tensor([[True, False, True, False]]))
    assert (found.zeros, found.over, found.masked_nonzero) == (2, 0, 1)


def test_a_pattern_that_another_one_implies_is_not_among_the_strongest() -> None:
    assert names(strongest(look_at(torch.zeros(2, 32), 1).patterns)) == "1:8"
    only_4_8 = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 1]])
    assert names(strongest(look_at(only_4_8, 1).patterns)) == "3:4 4:8"
    assert Pattern(1, 4).implies(Pattern(1, 2)) and Pattern(1, 4).implies(Pattern(2, 8))
    assert not Pattern(2, 4).implies(Pattern(1, 2)) and not Pattern(4, 8).implies(Pattern(2, 4))


def test_a_matrix_without_weights_has_no_zeros() -> None:
    assert look_at(torch.empty(0, 8), 1, asked=Pattern(2, 4)).over == 0
