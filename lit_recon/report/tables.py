"""Tables over runs, groups, rates and criteria: the same cells on the page, in Markdown and in CSV.

CSV has the numbers as they are, Markdown and page as people read them. A cell of text that a spreadsheet would take for
a formula is prefixed by an apostrophe (OWASP, CSV injection).
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lit_recon.report.comparison import escaped
from lit_recon.report.evaluations import latest, tasks_text
from lit_recon.report.format import as_share
from lit_recon.report.groups import ABSENT, Group, RateSweep, label_of, value_of
from lit_recon.report.measures import (
    GAP,
    GAP_IN_NATS,
    HELD_OUT,
    NATS,
    PERPLEXITY,
    PRUNED,
    TOKENS,
    WALK_MEMORY,
    WALK_SECONDS,
    Measure,
)
from lit_recon.report.runs import EVALUATED, Run, protocol_of
from lit_recon.report.study import Study, spread_header, spread_rows

LONGEST = 60  # letters of a setting that people read
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a cell begins with that a spreadsheet computes
GROUPED = (PRUNED, PERPLEXITY, NATS, GAP, GAP_IN_NATS, HELD_OUT, TOKENS, WALK_SECONDS, WALK_MEMORY)


class Column(NamedTuple):
    """A column: its label, with the unit, and the names of its numbers in CSV."""

    label: str
    keys: tuple[str, ...]
    is_number: bool = True


class Cell(NamedTuple):
    """A cell: what people read, and the values behind it, by the first of which rows are sorted."""

    text: str
    values: tuple[float | str, ...]
    link: str = ""

    @property
    def order(self) -> str:
        """What the page sorts by; empty for what has no number."""
        value = self.values[0]
        if isinstance(value, str):
            return "" if value == ABSENT else value
        return repr(value) if math.isfinite(value) else ""


@dataclass(frozen=True)
class Table:
    """Columns, and rows of as many cells."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def without(self, label: str) -> "Table":
        """The table without a column."""
        kept = [index for index, column in enumerate(self.columns) if column.label != label]
        return Table([self.columns[index] for index in kept], [[row[index] for index in kept] for row in self.rows])

    def as_csv(self) -> bytes:
        """The table as CSV: UTF-8, a comma between cells."""
        buffer = io.StringIO()
        writer = csv.writer(buffer)  # ends lines by CR LF (RFC 4180), so that a cell with either is quoted
        writer.writerow([_harmless(key) for column in self.columns for key in column.keys])
        for row in self.rows:
            writer.writerow([_harmless(value) for cell in row for value in cell.values])
        return buffer.getvalue().encode(errors="backslashreplace")

    def as_markdown(self) -> bytes:
        """The table in GitHub's Markdown."""
        rows = [[escaped(column.label) for column in self.columns]]
        rows.append(["---:" if column.is_number else "---" for column in self.columns])
        rows += [[escaped(cell.text) for cell in row] for row in self.rows]
        return "".join(f"| {' | '.join(row)} |\n" for row in rows).encode(errors="backslashreplace")


def _harmless(value: float | str) -> float | str:
    """A value that no spreadsheet computes; numbers that are not finite are empty."""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(FORMULA) else value
    return value if math.isfinite(value) else ""


def runs_table(names: Mapping[str, Run], keys: Sequence[str], measures: Sequence[Measure]) -> Table:
    """A row per run: number, name, state, the settings in which runs differ, and what was measured.

    Where perplexities are of several texts, or a checkpoint was only evaluated, a last column says on what each is.

    Args:
        names: Runs by their names, in the order of the rows.
        keys: Keys of config.yaml.
        measures: What is shown of each.
    """
    columns = [Column("#", ("number",)), Column("run", ("run",), False), Column("state", ("state",), False)]
    columns += [Column(label_of(key), (key,), False) for key in keys]
    texts = _texts_of_evaluations(list(names.values()))
    columns += [Column(measure.label, (measure.key,)) for measure in measures]
    columns += [Column(label, (label.replace(" ", "_"),), False) for label in texts]
    rows = []
    for number, (name, run) in enumerate(names.items(), start=1):
        row = [Cell(str(number), (number,)), Cell(name, (name,)), Cell(run.state, (run.state,))]
        row += [setting_cell(value_of(run, key)) for key in keys]
        row += [Cell(measure.text_of(run), (measure.of(run),)) for measure in measures]
        row += [setting_cell(found[number - 1] or ABSENT) for found in texts.values()]
        rows.append(row)
    return Table(columns, rows)


def _texts_of_evaluations(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Columns of text besides settings: protocols where one may be another, scores on tasks where a run has some."""
    found = {}
    if any(run.state == EVALUATED for run in runs) or len({protocol_of(run) for run in runs} - {""}) > 1:
        found["perplexity on"] = [protocol_of(run) for run in runs]
    scores = [latest(run.evaluations, "tasks") for run in runs]
    if any(scores):
        found["tasks"] = [tasks_text(one) if one else "" for one in scores]
    return found


def groups_table(groups: Sequence[Group], measures: Sequence[Measure]) -> Table:
    """A row per group: the settings that its runs share, their number, means and standard deviations.

    Args:
        groups: Groups of the same keys.
        measures: What means are taken of.
    """
    keys = list(groups[0].values) if groups else []
    columns = [Column(label_of(key), (key,), False) for key in keys]
    columns.append(Column("runs", ("finished", "runs")))
    columns += [Column(one.label, (f"{one.key}_mean", f"{one.key}_standard_deviation")) for one in measures]
    rows = []
    for group in groups:
        finished = sum(run.results is not None for run in group.runs)
        number = str(finished) if finished == len(group.runs) else f"{finished} of {len(group.runs)}"
        row = [setting_cell(value) for value in group.values.values()]
        row.append(Cell(number, (finished, len(group.runs))))
        rows.append([*row, *(mean_cell(group, measure) for measure in measures)])
    return Table(columns, rows)


def rates_table(sweeps: Sequence[RateSweep]) -> Table:
    """Two rows per sweep over rates: the rate that each rule chooses, and what its runs reached.

    Args:
        sweeps: The sweeps; what tells them apart is a column where there are several.
    """
    measures = (HELD_OUT, PERPLEXITY, NATS)
    columns = [Column("sweep", ("sweep",), False)] if any(sweep.about for sweep in sweeps) else []
    columns += [Column("rule", ("rule",), False), Column("rate", ("rate",))]
    columns += [Column(one.label, (f"{one.key}_mean", f"{one.key}_standard_deviation")) for one in measures]
    rows = []
    for sweep in sweeps:
        for rule, group in sweep.choices.items():
            (rate,) = group.values.values()
            row = [setting_cell(sweep.about)] if columns[0].label == "sweep" else []
            row += [Cell(rule, (rule,)), setting_cell(rate)]
            rows.append([*row, *(mean_cell(group, measure) for measure in measures)])
    return Table(columns, rows)


def criteria_table(study: Study) -> Table:
    """The spread between criteria before and after reconstruction."""
    what, *others = spread_header(study)
    columns = [Column(what, ("spread_between_criteria",), False), *(Column(label, (label,)) for label in others)]
    rows = []
    for row in spread_rows(study):
        pruned, reconstructed = (Cell(row.as_text(one), (one,)) for one in (row.pruned, row.reconstructed))
        rows.append([Cell(row.what, (row.what,)), pruned, reconstructed, Cell(as_share(row.left), (row.left,))])
    return Table(columns, rows)


def setting_cell(value: str) -> Cell:
    """A setting; people read the beginning of a long one."""
    return Cell(value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}…", (value,))


def mean_cell(group: Group, measure: Measure) -> Cell:
    """Mean and standard deviation of a group's runs."""
    mean, deviation = group.mean(measure), group.deviation(measure)
    text = measure.as_text(mean) if any(run.results for run in group.runs) else ABSENT
    if math.isfinite(mean) and math.isfinite(deviation):
        text += f" ± {measure.as_text(deviation)}"
    return Cell(text, (mean, deviation))
