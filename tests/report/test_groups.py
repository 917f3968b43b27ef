"""Groups of runs: which settings tell runs apart, mean and spread, the rates that a sweep chooses, windows by size."""

import math
from pathlib import Path
from typing import Any

import pytest
from finished_run import REFUSED, in_units

from lit_recon.report.groups import Group, differing_keys, granularity, grouped, rate_sweeps, resolve
from lit_recon.report.measures import GAP_IN_NATS, HELD_OUT, NATS, PERPLEXITY, measures
from lit_recon.report.runs import FINISHED, RUNNING, Run

WANDA = {"criterion._target_": "lit_recon.pruning.criteria.wanda.Wanda", "seed": 0}
RIA = {"criterion._target_": "lit_recon.pruning.criteria.ria.RIA", "seed": 0}


def run_of(config: dict[str, Any], *, perplexity: float = 20.0, held_out: float = 0.1, **recipe: str) -> Run:
    """A finished run with these settings and numbers."""
    results = in_units(1)
    results["perplexity"] = {"dense": 10.0, "pruned": 40.0, "reconstructed": perplexity}
    results["windows"][0]["held_out_after"] = held_out
    results["recipe"] |= recipe
    return Run(Path("run"), FINISHED, results=results, config=config)


def test_runs_differ_in_settings_but_not_in_seeds_and_places() -> None:
    runs = [
        run_of({"seed": seed, "output_dir": f"runs/{seed}", "lr": 1e-3, "data.num_samples": samples})
        for seed, samples in ((0, 8), (1, 8), (2, 32))
    ]
    assert differing_keys(runs) == ["data.num_samples"]


def test_an_argument_of_one_class_only_does_not_tell_runs_apart_but_its_values_among_runs_of_that_class_do() -> None:
    plain, half, quarter = WANDA, RIA | {"criterion.alpha": 0.5}, RIA | {"criterion.alpha": 0.25}
    assert differing_keys([run_of(plain), run_of(half)]) == ["criterion._target_"]
    assert differing_keys([run_of(plain), run_of(half), run_of(quarter)]) == ["criterion._target_", "criterion.alpha"]


def test_of_settings_that_go_together_only_the_first_is_named() -> None:
    runs = [run_of({"loss.delta": delta, "module.loss.delta": delta, "lr": delta * 2}) for delta in (1.0, 2.0)]
    assert differing_keys(runs) == ["loss.delta", "lr"]


def test_groups_are_by_value_numbers_by_size_and_classes_by_name() -> None:
    runs = [run_of(base | {"n": number}) for base in (WANDA, RIA) for number in (128, 8, 32)]
    found = grouped(runs, ["criterion._target_", "n"])
    assert [tuple(group.values.values()) for group in found] == [
        *(("RIA", "8"), ("RIA", "32"), ("RIA", "128")),
        *(("Wanda", "8"), ("Wanda", "32"), ("Wanda", "128")),
    ]
    assert found[0].name == "criterion RIA, n 8"


def test_mean_and_standard_deviation_over_seeds_are_those_of_a_sample() -> None:
    group = Group({}, [run_of({}, perplexity=value) for value in (18.0, 20.0, 25.0)])
    assert group.mean(PERPLEXITY) == pytest.approx(21.0)
    assert group.deviation(PERPLEXITY) == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert math.isnan(Group({}, group.runs[:1]).deviation(PERPLEXITY))


def test_a_run_that_broke_is_not_averaged_away_and_one_that_still_runs_is_not_counted() -> None:
    running = Run(Path("run"), RUNNING)
    assert Group({}, [run_of({}, perplexity=20.0), running]).mean(PERPLEXITY) == 20.0
    assert math.isnan(Group({}, [run_of({}, perplexity=20.0), run_of({}, perplexity=math.inf)]).mean(PERPLEXITY))


def test_nats_are_logs_of_perplexity_over_the_dense_models() -> None:
    run = run_of({}, perplexity=20.0)
    assert NATS.of(run) == pytest.approx(math.log(2)) and GAP_IN_NATS.of(run) == pytest.approx(0.5)
    assert math.isnan(NATS.of(run_of({}, perplexity=math.nan))) and math.isnan(NATS.of(Run(Path("run"), RUNNING)))


def test_the_held_out_error_is_that_of_the_weights_that_each_window_kept() -> None:
    results = in_units(2)
    results["windows"][1] |= REFUSED  # keeps its pruned weights: 0.022
    run = Run(Path("run"), FINISHED, results=results)
    assert HELD_OUT.of(run) == pytest.approx(0.011), "the geometric mean of 0.0055 and 0.022"
    left_out = results["windows"][1] | {"held_out_before": 0.0, "held_out_after": 0.0}
    with_another = Run(Path("run"), FINISHED, results=results | {"windows": [*results["windows"], left_out]})
    assert HELD_OUT.of(with_another) == pytest.approx(0.011), "it was not measured"
    results["windows"][1] |= {"measure": "KL divergence"}
    assert HELD_OUT.of(run) == pytest.approx(0.0055), "divergences are no relative errors"
    for first, second in ((None, 0.0), (0.0, None)):
        results["windows"][0] |= {"held_out_after": first}
        results["windows"][1] |= {"held_out_before": second, "measure": "relative error"}
        assert math.isnan(HELD_OUT.of(run))
    results["windows"][1] |= {"held_out_before": 0.1}
    assert HELD_OUT.of(run) == 0.0


def test_measures_of_evaluations_are_shown_where_there_are_any() -> None:
    keys = [measure.key for measure in measures([run_of({})])]
    assert "perplexity_reconstructed" in keys and "tasks_mean" not in keys


def test_a_sweep_over_rates_names_the_choice_by_held_out_error_and_that_by_test_perplexity() -> None:
    numbers = {1e-4: (0.3, [24.0, 25.0]), 1e-3: (0.1, [21.0, 22.0]), 1e-2: (0.2, [20.0, 19.0])}
    runs = [
        run_of({"module.optimizer.lr": rate, "seed": seed}, held_out=held_out, perplexity=perplexity)
        for rate, (held_out, both) in numbers.items()
        for seed, perplexity in enumerate(both)
    ]
    (sweep,) = rate_sweeps(runs)
    assert sweep.about == "" and [len(group.runs) for group in sweep.rates] == [2, 2, 2]
    chosen = {rule: list(group.values.values()) for rule, group in sweep.choices.items()}
    assert chosen == {
        "chosen by held-out error": ["0.001"],
        "chosen by test perplexity (the paper's rule)": ["0.01"],
    }
    assert sweep.by_test.mean(PERPLEXITY) == pytest.approx(19.5)


def test_rates_are_compared_only_among_runs_that_share_all_else() -> None:
    runs = [
        run_of({"module.optimizer.lr": rate, "epochs": epochs}, perplexity=20 + rate)
        for epochs, rates in ((1, (1, 2)), (5, (1, 2)), (10, (1,)))
        for rate in rates
    ]
    found = rate_sweeps(runs)
    assert [(sweep.about, len(sweep.rates)) for sweep in found] == [("epochs 1", 2), ("epochs 5", 2)]
    assert rate_sweeps(runs[:1]) == []


def test_a_rate_at_which_a_run_broke_is_not_chosen() -> None:
    runs = [run_of({"module.optimizer.lr": rate}, perplexity=value) for rate, value in ((1, 30.0), (2, math.nan))]
    (sweep,) = rate_sweeps(runs)
    assert list(sweep.by_test.values.values()) == ["1"]


def test_a_key_that_no_run_has_is_refused_with_those_that_it_may_mean() -> None:
    runs = [run_of(WANDA | {"data.num_samples": 8})]
    assert resolve("data.num_samples", runs) == "data.num_samples"
    assert resolve("criterion", runs) == "criterion._target_"
    with pytest.raises(ValueError, match="--group data.samples: no run has this key.*data.num_samples"):
        resolve("data.samples", runs)


def test_windows_are_compared_at_the_same_epochs_where_these_differ() -> None:
    runs = [
        run_of({"trainer.max_epochs": epochs}, windows=kind, perplexity=perplexity)
        for kind, epochs, perplexity in (("half", 1, 18.0), ("half", 16, 16.0), ("block", 1, 19.0), ("block", 4, 17.0))
    ]
    found = [(*group.values.values(), group.mean(PERPLEXITY)) for group in granularity(runs)]
    assert found == [("half", "1", 18.0), ("half", "16", 16.0), ("block", "1", 19.0), ("block", "4", 17.0)]


def test_windows_are_ordered_by_their_size_and_least_squares_are_a_kind_of_their_own() -> None:
    kinds = ["model", "blocks of 10", "blocks of 4", "half", "matrix", "block"]
    runs = [run_of({}, windows=kind) for kind in kinds] + [run_of({}, windows="matrix", module="LeastSquares")]
    names = [group.name.removeprefix("windows ") for group in granularity(runs)]
    assert names == ["matrix", "matrix, least squares", "half", "block", "blocks of 4", "blocks of 10", "model"]
    assert granularity(runs[:1]) == []
    some = [run_of({}, windows=text) for text in ("block", "block, 0.25 of them, most alike, skipped")]
    assert granularity(some) == [], "they are of one size"
