"""How many weights stay is counted: what a pattern, criterion or refinement of the user's own gets wrong is named."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, chain_of, masks_of
from torch import Tensor

from lit_recon.model.architectures import tiny_model
from lit_recon.model.matrices import Matrix
from lit_recon.model.partition import partition
from lit_recon.pruning.criteria import Pruned
from lit_recon.pruning.criteria.given import GivenMasks
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.patterns import NM, Chooser, Pattern, Unstructured, check_mask, count_kept
from lit_recon.pruning.pruner import Pruner
from lit_recon.system.finite import Unusable

TOKENS_ST = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(1))
HALF = Unstructured(sparsity=0.5)
FIRST = "model.layers.0.self_attn.q_proj.weight"  # 32 x 32


@dataclass
class Refined:
    """A refinement that does to the mask what it is told."""

    change: Callable[[Tensor], Tensor]

    def start(self, weight_OI: Tensor) -> float:
        return 0.0

    def update(self, statistics: float, inputs_NI: Tensor) -> float:
        return statistics

    def refine(self, weight_OI: Tensor, mask_OI: Tensor, statistics: float, width: int | None) -> Tensor:
        return self.change(mask_OI)


def in_place(mask_OI: Tensor) -> Tensor:
    mask_OI[3] = True
    return mask_OI


def within_a_row(mask_OI: Tensor) -> Tensor:
    """As many of each row, but others of its groups."""
    return torch.arange(mask_OI.shape[1]) < mask_OI.sum(1, keepdim=True)


def across_rows(mask_OI: Tensor) -> Tensor:
    """As many of the matrix, but others of its rows."""
    mask_OI = mask_OI.clone()
    mask_OI[3], mask_OI[4] = True, False
    return mask_OI


def decide(pattern: Pattern = HALF, refinement: Any = None, criterion: Any = None) -> dict[str, Tensor]:
    """The masks of the first block."""
    model = tiny_model("llama")
    pruner = Pruner(criterion or Magnitude(), pattern, chain_of(model, TOKENS_ST, 4), refinement=refinement)
    return masks_of(pruner, partition(model)[0])


@pytest.mark.parametrize(
    ("pattern", "change", "message"),
    [
        (
            HALF,
            in_place,
            "Refined keeps 32 weights of row 3, where the mask kept 16; expected a refinement to exchange",
        ),
        (HALF, across_rows, "Refined keeps 32 weights of row 3, where the mask kept 16"),
        (NM(n=2, m=4), within_a_row, "Refined keeps 4 weights of row 0, group 0 of 4, where the mask kept 2"),
        (
            HALF,
            lambda mask_OI: mask_OI.float(),
            "the mask that Refined makes is float32 (32, 32); expected bool (32, 32)",
        ),
        (HALF, lambda mask_OI: mask_OI[:, :-2], "the mask that Refined makes is bool (32, 30)"),
        (HALF, lambda mask_OI: mask_OI[:-1], "the mask that Refined makes is bool (31, 32)"),
    ],
    ids=["in place", "rows", "groups", "numbers", "columns", "fewer rows"],
)
def test_a_refinement_that_keeps_more_or_fewer_weights_is_named_with_the_matrix(
    pattern: Pattern, change: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(Unusable, match=f"^{FIRST}: {re.escape(message)}"):
        decide(pattern, Refined(change))


def test_a_refinement_that_exchanges_weights_is_used() -> None:
    expected = {name: within_a_row(mask_OI) for name, mask_OI in decide().items()}
    refined = decide(refinement=Refined(within_a_row))
    assert all(torch.equal(refined[name], mask_OI) for name, mask_OI in expected.items())


class Updating(Magnitude):
    """Changes weights, and leaves out a row of the mask once it is refined."""

    times = 0

    def prune(self, weight_OI: Tensor, statistics: Any, choose: Chooser) -> Pruned:
        self.times += 1
        mask_OI = choose(weight_OI.abs()).clone()
        mask_OI[5] &= self.times == 1
        return Pruned(mask_OI, weight_OI * mask_OI)


def test_a_criterion_that_does_not_keep_to_the_refined_mask_is_named() -> None:
    with pytest.raises(Unusable, match=f"^{FIRST}: Updating keeps 0 weights of row 5, where the mask kept 16"):
        decide(criterion=Updating(), refinement=Refined(lambda mask_OI: torch.arange(32).expand(32, 32) < 16))


class Given(GivenMasks):
    """Half of each row."""

    def check(self, *_: Any) -> None:
        return None

    def given(self, matrix: Matrix) -> tuple[Tensor, None]:
        return torch.arange(matrix.weight.shape[1]).expand_as(matrix.weight) % 2 == 0, None


def test_a_refinement_of_masks_that_are_given_is_looked_at_as_well() -> None:
    with pytest.raises(Unusable, match=f"^{FIRST}: Refined keeps 32 weights of row 3, where the mask kept 16"):
        decide(criterion=Given(), refinement=Refined(in_place))


@dataclass(frozen=True)
class Own:
    """A pattern of the user's own."""

    make: Callable[[Tensor], Tensor]
    sparsity: float = 0.5

    def describe(self) -> str:
        return "own"

    def check(self, name: str, outputs: int, inputs: int) -> None:
        return None

    def __call__(self, scores_OI: Tensor) -> Tensor:
        return self.make(scores_OI)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda scores_OI: scores_OI > 1e9,
            "Own keeps 0 of its 1,024 weights; expected 512 by the pattern's",
        ),
        (lambda scores_OI: scores_OI >= 0, "Own keeps 1,024 of its 1,024 weights; expected 512"),
        (lambda scores_OI: scores_OI, "the mask that Own makes is float32 (32, 32); expected bool (32, 32)."),
        (lambda scores_OI: scores_OI[:2] > 0, "the mask that Own makes is bool (2, 32); expected bool (32, 32)"),
    ],
    ids=["none", "all", "numbers", "shape"],
)
def test_a_pattern_that_does_not_keep_to_its_sparsity_is_named_with_the_matrix(
    make: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(Unusable, match=f"^{FIRST}: {re.escape(message)}"):
        decide(Own(make))


def test_a_pattern_may_round_each_row_and_zeros_are_no_departure() -> None:
    dense_OI, sparse_OI = torch.ones(4, 10), torch.ones(4, 10)
    sparse_OI[:, :8] = 0
    for count in (3, 4, 5):  # of 10, where 0.4 are asked for
        mask_OI = (torch.arange(10) >= count).expand(4, 10)
        check_mask(mask_OI, dense_OI, Own(torch.isnan, sparsity=0.4), "w")
    check_mask(sparse_OI != 0, sparse_OI, Own(torch.isnan, sparsity=0.4), "w")
    with pytest.raises(Unusable, match="keeps 8 of its 40 weights; expected 24"):
        check_mask(sparse_OI != 0, dense_OI, Own(torch.isnan, sparsity=0.4), "w")


def test_groups_are_counted_a_part_of_the_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    mask_OI = torch.rand(7, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    monkeypatch.setattr("lit_recon.pruning.patterns._AT_ONCE", 24)
    for width in (None, 4):
        expected = [[sum(row[at : at + (width or 12)]) for at in range(0, 12, width or 12)] for row in mask_OI.tolist()]
        assert count_kept(mask_OI, width).tolist() == expected


def test_a_run_whose_refinement_goes_wrong_is_refused_before_it_writes(tiny_run: Callable[..., Ended]) -> None:
    Path("mine.py").write_text(
        "class Greedy:\n"
        "    def start(self, weight_OI): return 0.0\n"
        "    def update(self, statistics, inputs_NI): return 0.0\n"
        "    def refine(self, weight_OI, mask_OI, statistics, width): return mask_OI | (weight_OI > 0)\n"
    )
    ended = tiny_run("+refine._target_=mine.Greedy")
    assert ended.status == 2 and "Greedy keeps" in ended.err and "where the mask kept" in ended.err, ended
    assert not Path("run").exists()


def test_one_that_goes_wrong_on_the_model_alone_ends_the_run_in_words(tiny_run: Callable[..., Ended]) -> None:
    Path("mine.py").write_text(
        "class Late:\n"
        "    def start(self, weight_OI): return 0.0\n"
        "    def update(self, statistics, inputs_NI): return statistics + len(inputs_NI)\n"
        "    def refine(self, weight_OI, mask_OI, statistics, width):\n"
        "        return mask_OI | (statistics == 8 * 32)\n"
    )
    ended = tiny_run("+refine._target_=mine.Late")
    assert ended.status == 1 and f"{FIRST}: Late keeps" in ended.err and "Traceback" not in ended.err, ended
