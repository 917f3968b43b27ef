"""Sparsities chosen by error: none of all combinations of levels has a lower sum at the same total."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from lit_recon.pruning.allocation.by_error import ErrorCurve, allocate_by_error
from lit_recon.system.finite import NotFinite

LEVELS = (0.0, 0.25, 0.5, 0.75)


def _curves(
    sizes: Sequence[int], errors: Sequence[Sequence[float]], levels: Sequence[float] = LEVELS
) -> list[ErrorCurve]:
    return [
        ErrorCurve(name=f"layer {index}", size=size, levels=levels, errors=of_group)
        for index, (size, of_group) in enumerate(zip(sizes, errors, strict=True))
    ]


def _random_errors(rng: np.random.Generator, groups: int, convex: bool) -> list[list[float]]:
    """Rising errors that start at 0, with rising steps if convex."""
    steps = rng.random((groups, len(LEVELS) - 1))
    steps = np.sort(steps, axis=1) if convex else steps
    return np.pad(steps.cumsum(1), ((0, 0), (1, 0))).tolist()


def _best_of_all(curves: Sequence[ErrorCurve], sparsity: float) -> float:
    """The least sum of errors at exactly this total: all groups on a level but one, which is in between its levels."""
    target = sparsity * sum(curve.size for curve in curves)
    best = np.inf
    for group, curve in enumerate(curves):
        others = [other for index, other in enumerate(curves) if index != group]
        for levels in product(*(range(len(other.levels)) for other in others)):
            removed = sum(other.size * other.levels[level] for other, level in zip(others, levels, strict=True))
            own = (target - removed) / curve.size
            if curve.levels[0] - 1e-12 <= own <= curve.levels[-1] + 1e-12:
                error = sum(other.errors[level] for other, level in zip(others, levels, strict=True))
                best = min(best, error + float(np.interp(own, curve.levels, curve.errors)))
    return best


def test_the_weights_go_where_the_next_ones_cost_least() -> None:
    # Error per removed weight of the steps: 0.01, 0.03, 0.05 in the first group, 0.02, 0.02, 0.08 in the second, twice
    # as large. In their order: 25 (first), 50 and 50 (second), 25 (first): 150 of 300.
    curves = _curves([100, 200], [[0, 0.25, 1.0, 2.25], [0, 1.0, 2.0, 6.0]])
    found = allocate_by_error(curves, 0.5)
    assert found.sparsities == [0.5, 0.5]
    assert (found.sparsity, found.remainder, found.error) == (0.5, 0.0, 3.0)
    # Of 90 weights, 25 go first, then 50, then 15 of the 50 of the next step.
    found = allocate_by_error(curves, 0.3)
    assert found.sparsities == pytest.approx([0.25, 0.325])
    assert found.sparsity == pytest.approx(0.3, abs=1e-15)
    assert found.error == pytest.approx(0.25 + 1.0 + 0.3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.33, 0.5, 0.7, 0.75])
def test_no_combination_of_convex_curves_has_a_lower_sum_at_the_same_total(seed: int, sparsity: float) -> None:
    rng = np.random.default_rng(seed)
    curves = _curves(rng.integers(10, 1000, 4).tolist(), _random_errors(rng, 4, convex=True))
    found = allocate_by_error(curves, sparsity)
    sizes = [curve.size for curve in curves]
    assert np.average(found.sparsities, weights=sizes) == pytest.approx(sparsity, abs=1e-12)
    assert found.error == pytest.approx(_best_of_all(curves, sparsity))
    errors = [np.interp(level, LEVELS, curve.errors) for level, curve in zip(found.sparsities, curves, strict=True)]
    assert found.error == pytest.approx(sum(errors))


@pytest.mark.parametrize("seed", range(5))
def test_without_interpolation_no_combination_that_removes_as_much_has_a_lower_sum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    curves = _curves([40] * 4, _random_errors(rng, 4, convex=True))
    for num_steps in range(12):  # of 10 weights each, of 160
        found = allocate_by_error(curves, num_steps / 16 + 0.02, interpolate=False)
        combinations = [levels for levels in product(range(4), repeat=4) if sum(levels) == num_steps]
        best = min(sum(curve.errors[k] for curve, k in zip(curves, levels, strict=True)) for levels in combinations)
        assert found.error == pytest.approx(best)
        assert found.sparsity == num_steps / 16
        assert found.remainder == pytest.approx(0.02 * 160)


def test_n_m_is_all_or_nothing_and_never_removes_more_than_asked_for() -> None:
    # Half of 100, 60 and 50 weights can go. Of 42 the cheapest 25 go, then 30 do not fit, and nothing else does.
    curves = _curves([100, 60, 50], [[0, 9.0], [0, 0.6], [0, 0.25]], levels=(0.0, 0.5))
    found = allocate_by_error(curves, 0.2, interpolate=False)
    assert found.sparsities == [0.0, 0.0, 0.5]
    assert found.remainder == pytest.approx(17)
    assert found.sparsity == pytest.approx(25 / 210)


def test_what_a_step_that_does_not_fit_leaves_is_filled_with_steps_that_do() -> None:
    # Of 40 weights: 10 (cheapest), not 50 (next), 30 (dearest).
    curves = _curves([100, 60, 20], [[0, 1.0], [0, 9.0], [0, 0.1]], levels=(0.0, 0.5))
    found = allocate_by_error(curves, 40 / 180, interpolate=False)
    assert found.sparsities == [0.0, 0.5, 0.5]
    assert found.remainder == 0


@pytest.mark.parametrize("seed", range(5))
def test_curves_that_are_not_convex_are_raised_along_their_hull(seed: int) -> None:
    rng = np.random.default_rng(seed)
    curves = _curves(rng.integers(10, 1000, 4).tolist(), _random_errors(rng, 4, convex=False))
    for curve in curves:
        hull = curve.hull()
        slopes = np.diff([curve.errors[k] for k in hull]) / np.diff([curve.levels[k] for k in hull])
        assert (hull[0], hull[-1]) == (0, 3) and (np.diff(slopes) >= -1e-12).all()
        chords = np.interp(LEVELS, [LEVELS[k] for k in hull], [curve.errors[k] for k in hull])
        assert (chords <= np.array(curve.errors) + 1e-12).all()
    found = allocate_by_error(curves, 0.4)
    hull_levels = [[curve.levels[k] for k in curve.hull()] for curve in curves]
    between = [level not in levels for level, levels in zip(found.sparsities, hull_levels, strict=True)]
    assert sum(between) <= 1


def test_a_bump_is_stepped_over() -> None:
    # Levels 1 and 2 lie above the line from level 0 to level 3.
    (curve,) = _curves([100], [[0, 3.0, 3.1, 3.2]])
    assert curve.hull() == [0, 3]
    assert curve.error_at(0.25) == 3.0
    assert curve.error_at(0.3) == pytest.approx(3.02)


def test_groups_that_are_alike_rise_together() -> None:
    curves = _curves([100] * 4, [[0, 1.0, 2.0, 3.0]] * 4)
    assert allocate_by_error(curves, 0.25).sparsities == [0.25] * 4
    assert allocate_by_error(curves, 0.375, interpolate=False).sparsities == [0.5, 0.5, 0.25, 0.25]


def test_a_group_whose_error_falls_goes_first() -> None:
    curves = _curves([100, 100], [[1.0, 2.0], [1.0, 0.5]], levels=(0.0, 0.5))
    assert allocate_by_error(curves, 0.25).sparsities == [0.0, 0.5]


def test_levels_need_not_start_at_zero() -> None:
    curves = _curves([100, 100], [[1.0, 2.0], [1.0, 5.0]], levels=(0.3, 0.6))
    assert allocate_by_error(curves, 0.45).sparsities == pytest.approx([0.6, 0.3])
    with pytest.raises(ValueError, match=r"sparsity=0\.2: errors were measured for 0\.3 to 0\.6"):
        allocate_by_error(curves, 0.2)


@pytest.mark.parametrize("interpolate", [True, False])
def test_a_sparsity_that_the_levels_do_not_reach_is_refused(interpolate: bool) -> None:
    curves = _curves([100, 100], [[0, 1.0], [0, 1.0]], levels=(0.0, 0.5))
    assert allocate_by_error(curves, 0.5, interpolate=interpolate).sparsities == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"sparsity=0\.6: errors were measured for 0 to 0\.5 of all weights"):
        allocate_by_error(curves, 0.6, interpolate=interpolate)


def test_totals_are_met_also_where_sums_are_not_exact() -> None:
    curves = _curves([7, 13, 29], [[0, 1, 2], [0, 1, 3], [0, 1, 4]], levels=(0.0, 0.1, 0.7))
    assert allocate_by_error(curves, 0.7, interpolate=False).sparsities == [0.7, 0.7, 0.7]
    assert allocate_by_error(curves, 0.1, interpolate=False).remainder == 0


def test_errors_that_are_not_finite_are_refused_by_the_name_of_their_group() -> None:
    with pytest.raises(NotFinite, match="layer 3: errors"):
        ErrorCurve(name="layer 3", size=10, levels=(0.0, 0.5), errors=(0.0, float("nan")))
