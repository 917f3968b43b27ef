"""DSnoT against the paper's equations, row by row in float64, and what must hold of every refined mask."""

import math

import pytest
import torch
from torch import Tensor

from lit_recon.pruning.refine.dsnot import DSnoT


def problem(outputs: int, inputs: int, *, seed: int = 0, kept: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a random mask and inputs with means and variances of their own."""
    generator = torch.Generator().manual_seed(seed)
    spread_I, mean_I = torch.rand(inputs, generator=generator) + 0.1, torch.randn(inputs, generator=generator)
    inputs_NI = torch.randn(100, inputs, generator=generator) * spread_I + mean_I
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    return weight_OI, torch.rand(outputs, inputs, generator=generator) < kept, inputs_NI


def refine(
    refinement: DSnoT, weight_OI: Tensor, mask_OI: Tensor, inputs_NI: Tensor, width: int | None = None
) -> Tensor:
    """The refined mask, of inputs that come in several batches."""
    statistics = refinement.start(weight_OI)
    for batch_NI in inputs_NI.split(7):
        statistics = refinement.update(statistics, batch_NI)
    return refinement.refine(weight_OI, mask_OI, statistics, width)


def reference(
    weight_I: Tensor, mask_I: Tensor, inputs_NI: Tensor, *, cycles: int = 50, threshold: float = 0.1, width: int
) -> Tensor:
    """One row's mask by the equations."""
    w, x, kept = weight_I.double(), inputs_NI.double(), mask_I.tolist()
    mean, variance, norm = x.mean(0), x.var(0, correction=0), x.square().mean(0).sqrt()

    def epsilon_of(kept: list[bool]) -> float:
        return sum(float(w[j] * mean[j]) for j in range(len(w)) if not kept[j])

    first = epsilon_of(kept)
    for _ in range(cycles):
        epsilon = epsilon_of(kept)
        if abs(epsilon) <= threshold * abs(first):
            break
        sign = math.copysign(1, epsilon)
        removable = [j for j in range(len(w)) if kept[j] and sign * w[j] * mean[j] < 0]
        growable = [i for i in range(len(w)) if not kept[i] and w[i] != 0]
        growable = [i for i in growable if any(j // width == i // width for j in removable)]
        if not growable:
            break
        grown = max(growable, key=lambda i: sign * w[i] * mean[i] / variance[i])
        removable = [j for j in removable if j // width == grown // width]
        removed = min(removable, key=lambda j: w[j].abs() * norm[j])
        tried = [True if k == grown else False if k == removed else kept[k] for k in range(len(w))]
        if abs(epsilon_of(tried)) >= abs(epsilon):
            break
        kept = tried
    return torch.tensor(kept)


def epsilons(weight_OI: Tensor, mask_OI: Tensor, inputs_NI: Tensor) -> Tensor:
    return ((weight_OI.double() * ~mask_OI) @ inputs_NI.double().mean(0)).abs()


@pytest.mark.parametrize("width", [None, 4])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cycles, threshold", [(1, 0.1), (50, 0.1), (50, 0.0), (50, 0.6)])
def test_masks_are_those_of_the_equations(cycles: int, threshold: float, seed: int, width: int | None) -> None:
    weight_OI, mask_OI, inputs_NI = problem(8, 24, seed=seed)
    refined_OI = refine(DSnoT(cycles, threshold), weight_OI, mask_OI, inputs_NI, width)
    for weight_I, mask_I, refined_I in zip(weight_OI, mask_OI, refined_OI, strict=True):
        expected_I = reference(
            weight_I, mask_I, inputs_NI, cycles=cycles, threshold=threshold, width=width or len(mask_I)
        )
        assert torch.equal(refined_I, expected_I)


def test_an_exchange_worked_out_by_hand() -> None:
    inputs_NI = torch.tensor([[1.0, 2.0, 0.5, 1.0], [3.0, 2.5, 1.5, 3.0]])  # means 2, 2.25, 1 and 2
    weight_OI = torch.tensor([[1.0, 1.0, -1.0, -3.0]])
    mask_OI = torch.tensor([[False, False, True, True]])
    # epsilon = 2 + 2.25. Input 1 is grown, with variance 1/16 instead of 1, and 2 pruned, which counts for less than 3:
    # 4.25 - 2.25 - 1 = 1 is left. Next, 0 would be grown and 3 pruned: 1 - 2 - 6 is farther from zero.
    assert refine(DSnoT(), weight_OI, mask_OI, inputs_NI).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("width", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_has_a_larger_epsilon_and_rows_and_groups_keep_their_counts(
    dtype: torch.dtype, width: int | None
) -> None:
    for seed, kept in enumerate((0.1, 0.5, 0.9)):
        weight_OI, mask_OI, inputs_NI = problem(16, 32, seed=seed, kept=kept)
        weight_OI, inputs_NI = weight_OI.to(dtype), inputs_NI.to(dtype)
        given = weight_OI.clone(), mask_OI.clone()
        refined_OI = refine(DSnoT(), weight_OI, mask_OI, inputs_NI, width)
        groups = (-1, width or 32)
        assert refined_OI.dtype == torch.bool
        assert torch.equal(refined_OI.view(groups).sum(1), mask_OI.view(groups).sum(1))
        before_O, after_O = (epsilons(weight_OI, mask, inputs_NI) for mask in (mask_OI, refined_OI))
        moved_O = (refined_OI != mask_OI).any(1)
        assert moved_O.any() and (after_O < before_O)[moved_O].all()
        assert all(map(torch.equal, given, (weight_OI, mask_OI)))


def test_a_row_makes_at_most_max_cycles_exchanges() -> None:
    weight_OI, mask_OI, inputs_NI = problem(30, 64)
    exchanged_O = (refine(DSnoT(2, 0.0), weight_OI, mask_OI, inputs_NI) & ~mask_OI).sum(1)
    assert exchanged_O.max() == 2


@pytest.mark.parametrize("width", [None, 4])
def test_pruned_zeros_stay_pruned(width: int | None) -> None:
    weight_OI, mask_OI, inputs_NI = problem(16, 16)
    weight_OI[:, ::3] = 0
    mask_OI &= weight_OI != 0
    assert not refine(DSnoT(), weight_OI, mask_OI, inputs_NI, width)[weight_OI == 0].any()


@pytest.mark.parametrize("width", [None, 4])
def test_masks_without_an_exchange_to_gain_from_stay(width: int | None) -> None:
    weight_OI, mask_OI, inputs_NI = problem(4, 16)
    every, none = torch.ones_like(mask_OI), torch.zeros_like(mask_OI)
    for weight, mask, inputs in (
        (weight_OI, every, inputs_NI),
        (weight_OI, none, inputs_NI),
        (torch.zeros_like(weight_OI), mask_OI, inputs_NI),
        (weight_OI, mask_OI, torch.zeros_like(inputs_NI)),
        (weight_OI, mask_OI, inputs_NI[:0]),  # no input at all
        (weight_OI, mask_OI, torch.full_like(inputs_NI, math.nan)),
    ):
        assert torch.equal(refine(DSnoT(), weight, mask, inputs, width), mask)


@pytest.mark.parametrize("rounding", [0, 1e-15, -1e-15])
def test_constant_inputs_are_grown_first_and_dead_inputs_not(rounding: float) -> None:
    inputs_NI = torch.ones(10, 5)
    inputs_NI[:, 1] += torch.arange(10) / 1000  # nearly constant, and larger
    inputs_NI[:, 2] = 0
    inputs_NI[:, 3:] *= -0.4
    statistics = DSnoT().update(DSnoT().start(torch.ones(1, 5)), inputs_NI)
    statistics.squares_I[0] *= 1 + rounding
    mask_OI = torch.tensor([[False, False, False, True, True]])
    # epsilon = 2; 0 grown, 3 pruned: 0.6 are left; with 1 grown, 4 pruned it would be -0.8
    refined_OI = DSnoT().refine(torch.ones(1, 5), mask_OI, statistics, None)
    assert refined_OI.tolist() == [[True, False, False, False, True]]


def test_variances_of_inputs_far_from_zero_are_exact_over_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs_NI = torch.randn(5000, 3, generator=generator) + torch.tensor([0.0, 100.0, 3000.0])
    statistics = DSnoT().start(torch.zeros(2, 3))
    for batch_NI in inputs_NI.split(13):
        statistics = DSnoT().update(statistics, batch_NI)
    num_rows, sum_I, squares_I = statistics
    assert num_rows == 5000
    torch.testing.assert_close(
        squares_I / num_rows - (sum_I / num_rows).square(), inputs_NI.double().var(0, correction=0), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    "name, value",
    [("max_cycles", 0), ("max_cycles", 1.5), ("max_cycles", True), ("threshold", -0.1), ("threshold", 1)]
    + [("threshold", "a"), ("threshold", math.nan), ("threshold", None), ("threshold", False)],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"refine.{name}={value}: expected"):
        DSnoT(**{name: value})  # type: ignore[arg-type]
