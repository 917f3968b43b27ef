"""RIA against its formula, term by term, and where it would divide by zero."""

import math

import pytest
import torch
from torch import Tensor

from lit_recon.pruning.criteria.ria import RIA


def formula(weight_OI: Tensor, inputs_NI: Tensor, alpha: float) -> list[list[float]]:
    """|W_ij| over the sums of its row and its column, times the norm of input j to the power of alpha."""
    rows = weight_OI.double().abs().tolist()
    columns = list(zip(*rows, strict=True))
    norms = [math.sqrt(sum(value * value for value in column)) for column in inputs_NI.double().T.tolist()]
    return [
        [(value / sum(row) + value / sum(columns[j])) * norms[j] ** alpha for j, value in enumerate(row)]
        for row in rows
    ]


def scores(criterion: RIA, weight_OI: Tensor, *batches_NI: Tensor) -> Tensor:
    statistics = criterion.start(weight_OI)
    for inputs_NI in batches_NI:
        statistics = criterion.update(statistics, inputs_NI)
    return criterion.scores(weight_OI, statistics)


def test_scores_by_hand() -> None:
    weight_OI = torch.tensor([[1.0, -2.0, 0.0, 1.0], [3.0, 2.0, 4.0, -1.0], [0.0, 4.0, -4.0, 2.0]])  # rows: 4, 10, 10
    inputs_NI = torch.tensor([[1.0, 3.0, 0.0, 16.0], [0.0, 4.0, 4.0, 0.0]])  # columns: 4, 8, 8, 4; norms: 1, 5, 4, 16
    expected = [
        [1 / 4 + 1 / 4, (2 / 4 + 2 / 8) * 5**0.5, 0, (1 / 4 + 1 / 4) * 4],
        [3 / 10 + 3 / 4, (2 / 10 + 2 / 8) * 5**0.5, (4 / 10 + 4 / 8) * 2, (1 / 10 + 1 / 4) * 4],
        [0, (4 / 10 + 4 / 8) * 5**0.5, (4 / 10 + 4 / 8) * 2, (2 / 10 + 2 / 4) * 4],
    ]
    torch.testing.assert_close(scores(RIA(), weight_OI, inputs_NI), torch.tensor(expected))


@pytest.mark.parametrize("alpha", [0, 0.5, 1.0, 2.5])
def test_scores_are_those_of_the_formula_and_batches_add_up(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI, inputs_NI = torch.randn(12, 20, generator=generator), torch.randn(50, 20, generator=generator)
    found_OI = scores(RIA(alpha=alpha), weight_OI, *inputs_NI.split(7))
    torch.testing.assert_close(found_OI, torch.tensor(formula(weight_OI, inputs_NI, alpha)))


def test_rows_columns_and_inputs_of_zeros_score_zero_and_leave_the_others_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI, inputs_NI = torch.randn(5, 6, generator=generator), torch.randn(9, 6, generator=generator)
    weight_OI[2], weight_OI[:, 3], inputs_NI[:, 4] = 0, 0, 0
    found_OI = scores(RIA(), weight_OI, inputs_NI)
    assert (found_OI[2] == 0).all() and (found_OI[:, 3] == 0).all() and (found_OI[:, 4] == 0).all()
    rows, columns = torch.tensor([0, 1, 3, 4])[:, None], torch.tensor([0, 1, 2, 4, 5])
    expected = torch.tensor(formula(weight_OI[rows, columns], inputs_NI[:, columns], 0.5))
    torch.testing.assert_close(found_OI[rows, columns], expected)
    assert (scores(RIA(), torch.zeros(3, 4), torch.ones(2, 4)) == 0).all()


def test_16_bit_weights_and_inputs_are_scored_and_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(6, 512, generator=generator).bfloat16()
    inputs_NI = torch.randn(300, 512, generator=generator).bfloat16()
    found_OI = scores(RIA(), weight_OI, *inputs_NI.split(9))
    assert found_OI.dtype == torch.float32
    torch.testing.assert_close(found_OI, torch.tensor(formula(weight_OI, inputs_NI, 0.5)))


@pytest.mark.parametrize("alpha", [-0.1, math.inf, math.nan, "0.5", None])
def test_an_exponent_that_is_negative_or_no_number_is_refused(alpha: object) -> None:
    with pytest.raises(ValueError, match=r"criterion\.alpha=.*at least 0"):
        RIA(alpha=alpha)  # type: ignore[arg-type]
