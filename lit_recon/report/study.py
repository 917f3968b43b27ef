"""Studies of the criterion: runs that differ in nothing else, and their spread before and after reconstruction.

The paper finds that with reconstruction the criterion matters less (arXiv 2510.14444): the spread of the reconstructed
models is smaller than that of the pruned ones. In perplexity it shrinks with the perplexities themselves, also where
all runs gain as many nats and stay as far apart as they were; hence it is measured in nats as well,

    nats over the dense model = log(perplexity / perplexity of the dense model).
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lit_recon.report.comparison import by_short_name, common_folder, escaped, settings, shared_and_different
from lit_recon.report.format import as_nats, as_perplexity, as_share
from lit_recon.report.run_files import STUDY_FIGURE, finite_or_nan

STATES = ("pruned", "reconstructed")


@dataclass(frozen=True)
class Study:
    """Runs that share every setting but the criterion and what refined its masks.

    Attributes:
        about: The settings that they share.
        runs: results.json by criterion.
        figure: The file of the study's figure, next to the runs.
    """

    about: str
    runs: Mapping[str, Mapping[str, Any]]
    figure: Path

    def perplexities(self, state: str) -> list[float]:
        """Perplexity of each run's model in a state; NaN where it is not finite."""
        return [finite_or_nan(results["perplexity"][state]) for results in self.runs.values()]

    def nats(self, state: str) -> list[float]:
        """The same in nats over the dense model."""
        both = zip(self.perplexities(state), self.perplexities("dense"), strict=True)
        return [math.log(found / dense) if found > 0 and dense > 0 else math.nan for found, dense in both]

    @property
    def worst(self) -> str:
        """The criterion whose pruned model is the worst: it broke, or has the most nats."""
        order = {name: math.inf if math.isnan(n) else n for name, n in zip(self.runs, self.nats("pruned"), strict=True)}
        return max(order, key=order.__getitem__)

    def without(self, name: str) -> "Study":
        """The study of all other criteria."""
        return replace(self, runs={other: results for other, results in self.runs.items() if other != name})


@dataclass(frozen=True)
class Spread:
    """How far apart values are; NaN if one of them is.

    Attributes:
        range: The largest minus the smallest.
        deviation: Standard deviation of these values (divided by their number: they are all there are).
    """

    range: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of some values."""
        return cls(float(np.ptp(values)), float(np.std(values)))


def studies(runs: Mapping[Path, Mapping[str, Any]]) -> list[Study]:
    """Studies among runs: those that share everything but the criterion, where there are at least two criteria.

    Args:
        runs: results.json by the folder of the run.
    """
    groups: dict[str, dict[Path, Mapping[str, Any]]] = defaultdict(dict)
    shared = {}
    for folder, results in runs.items():
        texts = {key: text for key, text in settings(results).items() if key != "criterion"}
        protocol = {name: value for name, value in results["protocol"].items() if name != "split"}
        key = json.dumps([texts, protocol], sort_keys=True)  # the split is in the data set's name; until 0.8 it was not
        groups[key][folder], shared[key] = results, texts
    compared = {key: group for key, group in groups.items() if len({_criterion(one) for one in group.values()}) > 1}
    main, different = shared_and_different({key: shared[key] for key in compared})
    figures = _figures([common_folder(group) for group in compared.values()])
    return [
        Study(", ".join(filter(None, [main, different[key]])), _by_criterion(group), figure)
        for (key, group), figure in zip(compared.items(), figures, strict=True)
    ]


def _criterion(results: Mapping[str, Any]) -> str:
    """What chose the masks of a run."""
    return settings(results)["criterion"]


def _by_criterion(group: Mapping[Path, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Results by criterion, and by the run's name as well where several runs have it."""
    by_name = by_short_name(group)
    criteria = [_criterion(results) for results in by_name.values()]
    return {
        criterion if criteria.count(criterion) == 1 else f"{criterion} ({name})": results
        for criterion, (name, results) in zip(criteria, by_name.items(), strict=True)
    }


def _figures(folders: Sequence[Path]) -> list[Path]:
    """A file for the figure of each study in the folder of its runs, numbered where several have the same folder."""
    seen: dict[Path, int] = defaultdict(int)
    paths = []
    for folder in folders:
        seen[folder] += 1
        path = folder / STUDY_FIGURE.format(f"_{seen[folder]}" if folders.count(folder) > 1 else "")
        paths.append(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return paths


class SpreadRow(NamedTuple):
    """One measure of a study's spread.

    Attributes:
        what: What it is.
        as_text: A number of it as people read it.
        pruned: Of the pruned models.
        reconstructed: Of the reconstructed models.
    """

    what: str
    as_text: Callable[[float], str]
    pruned: float
    reconstructed: float

    @property
    def left(self) -> float:
        """The share of it that is left after reconstruction; NaN where there was none."""
        return self.reconstructed / self.pruned if self.pruned else math.nan

    def texts(self) -> list[str]:
        """The row as people read it."""
        return [self.what, self.as_text(self.pruned), self.as_text(self.reconstructed), as_share(self.left)]


def spread_rows(study: Study) -> list[SpreadRow]:
    """Spread of a study.

    Of three runs or more, also without the worst: random masks alone would decide it, and say nothing of the others.
    """
    rows = _rows(study, "")
    return rows + _rows(study.without(study.worst), f", without {study.worst}") if len(study.runs) > 2 else rows


def _rows(study: Study, remark: str) -> list[SpreadRow]:
    """The same of all runs."""
    rows = []
    measures = ((study.perplexities, "perplexity", as_perplexity), (study.nats, "nats", as_nats))
    for values, unit, as_text in measures:
        pruned, reconstructed = (Spread.of(values(state)) for state in STATES)
        for name, before, after in (
            ("range", pruned.range, reconstructed.range),
            ("standard deviation", pruned.deviation, reconstructed.deviation),
        ):
            rows.append(SpreadRow(f"{name}, {unit}{remark}", as_text, before, after))
    return rows


def spread_table(study: Study) -> Group:
    """Spread of a study for the terminal: its settings, and a table."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    first, *others = spread_header(study)
    table.add_column(first, overflow="fold")
    for header in others:
        table.add_column(header, justify="right", no_wrap=True)
    for what, *numbers in (row.texts() for row in spread_rows(study)):
        table.add_row(Text(what), *numbers)  # Text: what looks like markup in a name is not read as markup
    return Group(Text(study.about, style="table.title"), table)


def spread_markdown(study: Study) -> str:
    """Spread of a study in GitHub's Markdown."""
    rows = [spread_header(study), ["---", "---:", "---:", "---:"]]
    rows += [[escaped(text) for text in row.texts()] for row in spread_rows(study)]
    return f"{escaped(study.about)}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def spread_header(study: Study) -> list[str]:
    """What stands above the columns of `spread_rows`."""
    return [f"spread between criteria, {len(study.runs)} runs", *STATES, "left"]
