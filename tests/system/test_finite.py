"""The first token of a pass that is not finite, asked after each batch or once for all."""

import pytest
import torch

from lit_recon.system.finite import FiniteTokens


@pytest.mark.parametrize("is_read_late", [False, True], ids=["at once", "late"])
def test_the_first_token_that_is_not_finite_is_told_by_sample_and_position(is_read_late: bool) -> None:
    tokens = FiniteTokens(is_read_late=is_read_late)
    for first_row in (0, 2, 4):
        outputs_BTD = torch.full((2, 3, 5), 3e38)  # whose sum is not finite
        if first_row == 2:
            outputs_BTD[1, 2, 4] = float("nan")
        if first_row == 4:
            outputs_BTD[0, 0, 0] = float("inf")
        tokens.look(outputs_BTD, first_row)
    assert tokens.first() == (3, 2)
    assert tokens.first() is None, "it is told once"
    tokens.look(torch.zeros(1, 1, 1), 0)
    assert tokens.first() is None


def test_nothing_is_read_before_it_is_asked_for() -> None:
    FiniteTokens(is_read_late=True).look(torch.empty(2, 3, 5, device="meta"), 0)  # which holds nothing to read
