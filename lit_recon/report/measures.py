"""What runs are compared by: one number of a run per measure, with its label, its unit and how it is written.

Perplexity shrinks together with the gap, so that there are nats as well: log(perplexity / perplexity of the dense
model), the additional cross-entropy per token.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_recon.report.evaluations import latest
from lit_recon.report.format import as_count, as_error, as_memory, as_nats, as_perplexity, as_share
from lit_recon.report.run_files import finite_or_nan
from lit_recon.report.runs import EVALUATED, Run
from lit_recon.system.clock import WALK
from lit_recon.system.units import duration


@dataclass(frozen=True)
class Measure:
    """A number that every finished run has, or NaN; some of them also a checkpoint that was only evaluated.

    Attributes:
        key: Name in CSV, with the unit at its end where it has one.
        label: Name on a page or a figure, with the unit.
        value: The number of a finished run.
        as_text: The number as people read it.
        evaluated: The number of a folder that has evaluations alone; None: it has none.
    """

    key: str
    label: str
    value: Callable[[Run], float]
    as_text: Callable[[float], str]
    evaluated: Callable[[Run], float] | None = None

    def of(self, run: Run) -> float:
        """The number of a run; NaN where it has none."""
        if run.results is not None:
            return self.value(run)
        return self.evaluated(run) if run.state == EVALUATED and self.evaluated is not None else math.nan

    def text_of(self, run: Run) -> str:
        """The number of a run as text; a dash for one that has not finished."""
        value = self.of(run)
        return self.as_text(value) if run.results is not None or math.isfinite(value) else "–"


def _results(run: Run) -> Mapping[str, Any]:
    assert run.results is not None, "asked of finished runs only"
    return run.results


def _number(*keys: str) -> Callable[[Run], float]:
    """The number at a place of results.json."""

    def value(run: Run) -> float:
        found: Any = _results(run)
        for key in keys:
            found = (found or {}).get(key)
        return finite_or_nan(found)

    return value


def _nats(state: str) -> Callable[[Run], float]:
    """Nats per token over the dense model."""

    def value(run: Run) -> float:
        perplexity = _results(run)["perplexity"]
        found, dense = finite_or_nan(perplexity[state]), finite_or_nan(perplexity["dense"])
        return math.log(found / dense) if found > 0 and dense > 0 else math.nan

    return value


def _gap_in_nats(run: Run) -> float:
    """Share of the pruned model's nats that reconstruction took back; NaN where pruning cost none."""
    pruned, reconstructed = _nats("pruned")(run), _nats("reconstructed")(run)
    return 1 - reconstructed / pruned if pruned > 0 else math.nan


def held_out_error(run: Run) -> float:
    """Geometric mean over windows of the held-out error of the weights that each kept; NaN if one is not finite.

    The errors of some windows are a hundred times those of others (massive activations), which would decide any other
    mean alone. A window that was not accepted kept its pruned weights. Windows that were not measured, such as those
    that a study leaves out, do not count; nor do those whose loss was on the logits, unless all were: their errors are
    divergences. Runs compare by it where the same windows were measured.
    """
    measured = [window for window in _results(run)["windows"] if window["held_out_before"] != 0]
    alike = [window for window in measured if window.get("measure", "relative error") == "relative error"] or measured
    errors = [finite_or_nan(window[f"held_out_{'after' if window['accepted'] else 'before'}"]) for window in alike]
    if not errors or any(map(math.isnan, errors)):
        return math.nan
    if min(errors) <= 0:
        return 0.0
    return math.exp(statistics.fmean(map(math.log, errors)))


def _tokens(run: Run) -> float:
    """Tokens that a run was given: those of windows, and those that only all layers at once saw."""
    return float(sum(_results(run)["tokens"].values()))


def _walk_seconds(run: Run) -> float:
    return sum(_results(run)["seconds"][phase] for phase in WALK)


def _bytes_in_gb(key: str) -> Callable[[Run], float]:
    return lambda run: _number(key)(run) / 1e9


def _evaluated(part: str, *keys: str) -> Callable[[Run], float]:
    """A number of the newest evaluation that has it."""

    def value(run: Run) -> float:
        found = latest(run.evaluations, part)
        for key in keys:
            found = (found or {}).get(key)
        return finite_or_nan(found)

    return value


def _evaluated_nats(state: str) -> Callable[[Run], float]:
    """Nats per token over the dense model, of the newest evaluation of perplexity."""

    def value(run: Run) -> float:
        found, dense = (_evaluated("perplexity", "perplexity", name)(run) for name in (state, "dense"))
        return math.log(found / dense) if found > 0 and dense > 0 else math.nan

    return value


def _gigabytes(value: float) -> str:
    return as_memory(value * 1e9) if math.isfinite(value) else "–"


def _seconds(value: float) -> str:
    return duration(value) if math.isfinite(value) else "–"


def _or_dash(as_text: Callable[[float], str]) -> Callable[[float], str]:
    return lambda value: as_text(value) if math.isfinite(value) else "–"


def _perplexity(state: str, evaluated: str) -> Measure:
    """Perplexity of a state of the model, by the names that results.json and evaluations have for it."""
    found = _evaluated("perplexity", "perplexity", evaluated)
    number = _number("perplexity", state)
    return Measure(f"perplexity_{state}", f"perplexity, {state}", number, as_perplexity, found)


DENSE = _perplexity("dense", "dense")
PRUNED = _perplexity("pruned", "pruned")
PERPLEXITY = _perplexity("reconstructed", "checkpoint")
NATS_PRUNED = Measure(
    key="nats_over_dense_pruned",
    label="nats over dense, pruned",
    value=_nats("pruned"),
    as_text=as_nats,
    evaluated=_evaluated_nats("pruned"),
)
NATS = Measure(
    key="nats_over_dense",
    label="nats over dense, reconstructed",
    value=_nats("reconstructed"),
    as_text=as_nats,
    evaluated=_evaluated_nats("checkpoint"),
)
_GAP = _evaluated("perplexity", "gap_recovered")
_GAP_NATS = _evaluated("perplexity", "gap_recovered_nats")
GAP = Measure("gap_recovered", "gap recovered", _number("gap_recovered"), as_share, _GAP)
GAP_IN_NATS = Measure("gap_recovered_nats", "gap recovered, in nats", _gap_in_nats, as_share, _GAP_NATS)
HELD_OUT = Measure("held_out_error", "held-out error", held_out_error, as_error)
FINAL = Measure(
    "relative_error", "relative error of final states", _number("relative_error", "reconstructed"), _or_dash(as_error)
)
SPARSITY = Measure("sparsity", "sparsity of prunable", _number("sparsity", "prunable"), as_share)
TOKENS = Measure("calibration_tokens", "calibration tokens", _tokens, as_count)
WALK_SECONDS = Measure("walk_seconds", "time, walk", _walk_seconds, _seconds)
SECONDS = Measure("total_seconds", "time, total", _number("seconds", "total"), _seconds)
WALK_MEMORY = Measure("walk_peak_memory_gb", "peak memory, walk", _bytes_in_gb("walk_peak_memory_bytes"), _gigabytes)
MEMORY = Measure("peak_memory_gb", "peak memory, total", _bytes_in_gb("peak_memory_bytes"), _gigabytes)
_MEAN = _evaluated("tasks", "mean", "checkpoint")
_KL, _TOP1 = _evaluated("agreement", "kl"), _evaluated("agreement", "top1")
ACCURACY = Measure("tasks_mean", "accuracy, mean of tasks", _MEAN, as_share, _MEAN)
DIVERGENCE = Measure("kl_nats_per_token", "KL from dense, nats per token", _KL, _or_dash(as_error), _KL)
AGREEMENT = Measure("top1_agreement", "top-1 agreement with dense", _TOP1, as_share, _TOP1)

MEASURES = (
    *(DENSE, PRUNED, PERPLEXITY, NATS_PRUNED, NATS, GAP, GAP_IN_NATS, HELD_OUT, FINAL, SPARSITY, TOKENS),
    *(WALK_SECONDS, SECONDS, WALK_MEMORY, MEMORY),
)
OF_EVALUATIONS = (ACCURACY, DIVERGENCE, AGREEMENT)


def measures(runs: Sequence[Run]) -> list[Measure]:
    """The measures that runs are compared by: those of evaluations where one of the runs has them."""
    return [*MEASURES, *(one for one in OF_EVALUATIONS if any(math.isfinite(one.of(run)) for run in runs))]
