"""Runs in groups: those that share some keys of config.yaml, and mean and spread of what was measured over the others.

By default the keys are all in which runs differ, seed and places apart, so that a group holds the seeds of one setting.
Of a setting's class and its arguments (`module._target_`, `module.rank`) an argument counts as different only among
runs of the same class: each class has arguments of its own.
"""

import difflib
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lit_recon.report.measures import HELD_OUT, PERPLEXITY, Measure
from lit_recon.report.runs import Run, as_setting

Key = TypeVar("Key")
TARGET = "_target_"
RATE = "module.optimizer.lr"
EPOCHS = "trainer.max_epochs"
APART = {  # of each run its own, or where and when it was made: no setting of the method
    *("seed", "output_dir", "experiment_dir", "overwrite", "plan", "resume", "stop_after", "memory_limit"),
    *("push", "push_private"),
}
ABSENT = "–"


@dataclass(frozen=True)
class Group:
    """Runs that share the values of some keys.

    Attributes:
        values: The values as text, by key.
        runs: The runs, finished or not.
    """

    values: Mapping[str, str]
    runs: Sequence[Run]

    def finite(self, measure: Measure) -> list[float]:
        """The numbers of those runs that have one."""
        return [value for value in map(measure.of, self.runs) if math.isfinite(value)]

    def mean(self, measure: Measure) -> float:
        """Their mean; NaN without any, or where one of the finished runs broke."""
        values = [measure.of(run) for run in self.runs if run.results is not None]
        return statistics.fmean(values) if values else math.nan

    def deviation(self, measure: Measure) -> float:
        """Their standard deviation, of a sample (divided by their number less one); NaN for fewer than two."""
        values = self.finite(measure)
        return statistics.stdev(values) if len(values) > 1 else math.nan

    @property
    def name(self) -> str:
        """The values, one after the other."""
        return ", ".join(f"{label_of(key)} {value}" for key, value in self.values.items()) or "all runs"


def value_of(run: Run, key: str) -> str:
    """A setting of a run as text; of a class its name alone."""
    if key not in run.config:
        return ABSENT
    text = as_setting(run.config[key])
    return text.rpartition(".")[2] if key.rpartition(".")[2] == TARGET else text


def label_of(key: str) -> str:
    """A key as people say it: that of a class is its setting's."""
    return key.removesuffix(f".{TARGET}")


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Keys of config.yaml in which runs differ, in its order; of keys that go together only the first."""
    known = [run for run in runs if run.config]
    keys = list(dict.fromkeys(key for run in known for key in run.config))
    found: dict[tuple[str, ...], str] = {}  # by the values of all runs
    for key in keys:
        if key not in APART and _differs(known, key):
            found.setdefault(tuple(value_of(run, key) for run in known), key)
    return list(found.values())


def _differs(runs: Sequence[Run], key: str) -> bool:
    """Whether runs of the same classes differ in a key."""
    parts = key.split(".")
    classes = [f"{'.'.join(parts[:end])}.{TARGET}" for end in range(1, len(parts))]
    above = [name for name in classes if name != key]
    alike = defaultdict(set)
    for run in runs:
        alike[tuple(value_of(run, name) for name in above)].add(value_of(run, key))
    return any(len(values) > 1 for values in alike.values())


def resolve(key: str, runs: Iterable[Run]) -> str:
    """The key of config.yaml that is meant: itself, or of a setting such as `criterion` that of its class.

    Raises:
        ValueError: No run has it.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.config))
    for name in (key, f"{key}.{TARGET}"):
        if name in known:
            return name
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
    like = f"; did you mean {', '.join(near)}?" if near else "."
    raise ValueError(f"--group {key}: no run has this key in its config.yaml{like}")


def grouped(runs: Sequence[Run], keys: Sequence[str]) -> list[Group]:
    """Groups of runs by the values of some keys, in the order of the values."""
    by_values = _by(runs, lambda run: tuple(value_of(run, key) for key in keys))
    ordered = sorted(by_values, key=lambda values: [order(value) for value in values])
    return [Group(dict(zip(keys, values, strict=True)), by_values[values]) for values in ordered]


def _by(runs: Iterable[Run], key: Callable[[Run], Key]) -> dict[Key, list[Run]]:
    found: dict[Key, list[Run]] = defaultdict(list)
    for run in runs:
        found[key(run)].append(run)
    return dict(found)


def order(value: str) -> tuple[bool, float, str]:
    """What values of settings are sorted by: numbers by size, before texts."""
    try:
        number = float(value)
    except ValueError:
        return True, 0.0, value
    return False, number if math.isfinite(number) else math.inf, value


@dataclass(frozen=True)
class RateSweep:
    """Runs that differ in the learning rate alone, besides the seed, and the two rates that one may choose.

    Attributes:
        about: What tells this sweep from others; empty for the only one.
        rates: Runs by rate.
        by_held_out: The rate with the smallest held-out error: nothing of the test text is looked at.
        by_test: The one with the smallest perplexity on the test text, the rule of the paper (arXiv 2510.14444).
    """

    about: str
    rates: Sequence[Group]
    by_held_out: Group
    by_test: Group

    @property
    def choices(self) -> dict[str, Group]:
        """Both, by the name of the rule."""
        return {
            "chosen by held-out error": self.by_held_out,
            "chosen by test perplexity (the paper's rule)": self.by_test,
        }


def rate_sweeps(runs: Sequence[Run]) -> list[RateSweep]:
    """Sweeps over rates among finished runs: those that share all settings but the rate, where there are two rates."""
    finished = [run for run in runs if run.results is not None and RATE in run.config]
    others = [key for key in dict.fromkeys(key for run in finished for key in run.config) if key not in {RATE, *APART}]
    alike = _by(finished, lambda run: tuple(value_of(run, key) for key in others))
    sweeps = [group for group in alike.values() if len({value_of(run, RATE) for run in group}) > 1]
    apart = [key for key in differing_keys([run for sweep in sweeps for run in sweep]) if key != RATE]
    found = []
    for sweep in sorted(sweeps, key=lambda sweep: [order(value_of(sweep[0], key)) for key in apart]):
        rates = grouped(sweep, [RATE])
        about = Group({key: value_of(sweep[0], key) for key in apart}, sweep).name if apart else ""
        choices = [_smallest(rates, measure) for measure in (HELD_OUT, PERPLEXITY)]
        if choices[0] is not None and choices[1] is not None:
            found.append(RateSweep(about, rates, choices[0], choices[1]))
    return found


def _smallest(groups: Sequence[Group], measure: Measure) -> Group | None:
    """The group with the smallest mean; None if no mean is finite."""
    means = [(group.mean(measure), index) for index, group in enumerate(groups)]
    finite = [(mean, index) for mean, index in means if math.isfinite(mean)]
    return groups[min(finite)[1]] if finite else None


def granularity(runs: Sequence[Run]) -> list[Group]:
    """Finished runs by their windows, the smallest windows first; empty unless there are two kinds of them.

    Where runs differ in their epochs, by these too: larger windows need more steps.
    """
    finished = [run for run in runs if run.results is not None]
    if len(_kinds(finished)) < 2:
        return []
    epochs = {value_of(run, EPOCHS) for run in finished}
    keys = ("windows", EPOCHS) if len(epochs) > 1 else ("windows",)
    groups = _by(finished, lambda run: (_windows(run), value_of(run, EPOCHS)))
    ordered = sorted(groups, key=lambda kind: (_size(kind[0]), order(kind[1])))
    return [Group(dict(zip(keys, kind, strict=False)), groups[kind]) for kind in ordered]


def _kinds(runs: Sequence[Run]) -> set[str]:
    """Kinds of windows of runs, whichever of them are chosen."""
    return {run.results["recipe"]["windows"].partition(",")[0] for run in runs if run.results is not None}


def _windows(run: Run) -> str:
    """Windows of a run; matrices that are solved for are not trained like others, nor are some of a window's."""
    assert run.results is not None
    recipe = run.results["recipe"]
    solved = recipe.get("module") == "LeastSquares"
    trained = f", {recipe['train']} trained" if "train" in recipe else ""
    return recipe["windows"] + (", least squares" if solved else trained)


def _size(kind: str) -> tuple[int, float, str]:
    """Place among windows by their size: matrix, half, block, several blocks, model."""
    digits = [float(word) for word in kind.replace(",", " ").split() if word.isdigit()]
    names = ("matrix", "half", "block", "blocks", "model")
    first = kind.replace(",", " ").split()[0] if kind.split() else ""
    return (names.index(first) if first in names else len(names)), digits[0] if digits else 0.0, kind
