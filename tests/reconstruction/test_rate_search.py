"""Which rates a window is tried at, from what its tries before came to."""

import math
from collections.abc import Callable

import pytest

from lit_recon.model.errors import Errors
from lit_recon.reconstruction.rate_search import (
    FEW,
    FURTHEST,
    ProbedRates,
    RateSearch,
    RetryRates,
    Try,
    kind_of,
    share_left,
)

BEFORE = Errors(1.0, 1.0)

MANY = [name.replace("#", f"{index}") for index in range(FEW) for name in ("block_#", "half_#_mlp", "half_#_attention")]


def tried(rate: float, left: float, **settings: object) -> Try:
    """A try that leaves a share of both errors."""
    errors = Errors(left, left)
    settings = {"diverged": False, "steps": 8, "lost": 0.0} | settings
    return Try(rate=rate, before=BEFORE, held_out=errors, calibration=errors, **settings)


def rates(search: RateSearch, left: Callable[[float], float], kind: str = "block_#", **settings: object) -> list[float]:
    """The rates of a window of which a rate leaves a share; what is best is learnt, as a fit does."""
    tries: list[Try] = []
    while (rate := search.next(kind, tries)) is not None:
        tries.append(tried(rate, left(rate), **settings))
        assert len(tries) < 30, "without end"
    if accepted := [one for one in tries if one.accepted]:
        best = min(accepted, key=lambda one: one.left)
        search.learn(kind, best.rate, best.left)
    return [one.rate for one in tries]


def valley(best: float, depth: float = 0.5) -> Callable[[float], float]:
    """An error that is smallest at a rate, and grows with every halving and doubling."""
    return lambda rate: 1 - depth * 0.8 ** abs(math.log2(rate / best))


def test_retries_go_through_the_rates_until_one_is_accepted() -> None:
    search = RetryRates((1 / 4, 1 / 16))
    assert rates(search, lambda rate: 0.9) == [1]
    assert rates(search, lambda rate: 0.9 if rate <= 1 / 4 else 1.1) == [1, 1 / 4]
    assert rates(search, lambda rate: 1.1) == [1, 1 / 4, 1 / 16]
    assert rates(search, lambda rate: 1.1, diverged=True, steps=0) == [1, 1 / 4, 1 / 16]
    assert rates(RetryRates(()), lambda rate: 1.1) == [1]
    assert rates(search, lambda rate: 1.1, lost=1.0) == [1], "of smaller steps rounding takes all the more"
    assert rates(search, lambda rate: 1.1, steps=0) == [1], "no step, so nothing that a rate could change"


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (1, [1, 1 / 2, 2]),
        (1 / 2, [1, 1 / 2, 1 / 4]),
        (1 / 16, [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]),
        (2, [1, 1 / 2, 2, 4]),
        (8, [1, 1 / 2, 2, 4, 8]),  # the largest
    ],
)
def test_a_probe_goes_down_until_it_is_worse_or_up_where_the_half_is_worse(best: float, expected: list[float]) -> None:
    search = ProbedRates(MANY)
    assert rates(search, valley(best)) == expected
    assert rates(search, valley(best)) == [best], "the next window is fitted once, at the rate that was found"


def test_a_probe_that_nothing_improves_goes_down_to_the_smallest_rate_and_ends() -> None:
    search = ProbedRates(MANY)
    expected = [2.0**-index for index in range(9)]
    assert expected[-1] == FURTHEST
    assert rates(search, lambda rate: 1 + rate) == expected
    assert rates(search, lambda rate: 1 + rate) == expected, "nothing was learnt"
    assert rates(search, lambda rate: 1 - rate if rate < 1 / 8 else 2) == [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_a_probe_ends_where_rates_make_no_difference() -> None:
    assert rates(ProbedRates(MANY), lambda rate: 0.8) == [1, 1 / 2, 2]
    assert rates(ProbedRates(MANY), lambda rate: 0.8, steps=0) == [1]


def test_a_window_that_gains_far_less_than_those_before_is_compared_with_its_neighbours() -> None:
    search = ProbedRates(MANY)
    assert rates(search, valley(1 / 4)) == [1, 1 / 2, 1 / 4, 1 / 8]
    assert rates(search, lambda rate: 1 - 0.5 * 0.26) == [1 / 4], "a bit more than a quarter of the usual gain"
    search = ProbedRates(MANY)
    rates(search, valley(1 / 4))
    assert rates(search, valley(1 / 4, depth=0.1)) == [1 / 4, 1 / 8, 1 / 2], "neither is better"
    assert rates(search, valley(1 / 4)) == [1 / 4]
    search = ProbedRates(MANY)
    rates(search, valley(1 / 4))
    assert rates(search, valley(1 / 16, depth=0.12)) == [1 / 4, 1 / 8, 1 / 16], "no further than two steps"
    assert rates(search, valley(1 / 16)) == [1 / 16], "what it found is carried on"
    assert rates(search, lambda rate: 1.1 if rate > 1 / 32 else 0.9)[:2] == [1 / 16, 1 / 32], "one that is not accepted"


def test_of_a_kind_with_few_windows_the_first_rate_that_gains_enough_is_taken() -> None:
    def of_few(left: Callable[[float], float]) -> list[list[float]]:
        search = ProbedRates(MANY[:-1])
        return [rates(search, left, "half_#_attention") for _ in range(2)]

    assert of_few(lambda rate: 0.5 + rate) == [[1, 1 / 4], [1 / 4]], "in steps of two, none back up"
    assert of_few(valley(1 / 4)) == [[1], [1]], "a better one would be near"
    assert of_few(lambda rate: 0.97 if rate == 1 else 0.7) == [[1, 1 / 4], [1 / 4]], "accepted is not enough"
    assert of_few(valley(1 / 16, depth=0.2)) == [[1, 1 / 4, 1 / 16, 1 / 64], [1 / 16]], "the best, where none is enough"
    assert of_few(valley(1, depth=0.2)) == [[1, 1 / 4], [1]]


def test_after_windows_all_layers_begin_at_their_usual_rate_and_take_the_first_that_is_accepted() -> None:
    def of_all(
        left: Callable[[float], float], before: tuple[float, ...] = (1 / 2, 1 / 4, 1 / 4, 1, 1 / 8)
    ) -> list[float]:
        return rates(ProbedRates(["global"], before=before), left, kind="global, KL divergence")

    assert of_all(lambda rate: 0.9) == [1 / 4]
    assert of_all(lambda rate: 0.9, before=()) == [1, 1 / 4], "of a pruned model it may be worth another pass"
    assert of_all(lambda rate: 0.9 if rate < 1 / 32 else 1.1) == [1 / 4, 1 / 16, 1 / 64]


def test_each_kind_of_window_has_a_rate_of_its_own() -> None:
    search = ProbedRates(MANY)
    rates(search, valley(1 / 4), "half_#_mlp")
    assert rates(search, valley(1), "half_#_attention") == [1 / 4, 1 / 8, 1 / 2, 1, 2], "from the rate of the other"
    assert rates(search, valley(1 / 4), "half_#_mlp") == [1 / 4]
    names = ["block_03.mlp.up_proj", "block_11.mlp.up_proj"]
    assert len({kind_of(name, "relative error") for name in names}) == 1
    assert kind_of(names[0], "relative error") != kind_of("block_03.mlp.gate_proj", "relative error")
    assert kind_of("block_29", "relative error") != kind_of("block_29", "KL divergence"), "the last one, with a head"


def test_what_is_left_is_that_of_the_typical_error() -> None:
    assert share_left(Errors(2.0, 0.5), Errors(1.0, 0.25)) == 0.5
    assert share_left(Errors(4.0, 1.0), Errors(1.0, 1.0)) == 1.0
    assert share_left(Errors(4.0, 0.0), Errors(1.0, 0.0)) == 1.0, "nothing to win of a typical token"
    assert tried(1, 0.5, diverged=True).left == math.inf
