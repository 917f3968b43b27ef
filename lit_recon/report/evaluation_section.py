"""The part of a page that shows evaluations.json, the same on the page of a run and on that of a foreign checkpoint.

Each evaluation is a row: perplexities with their protocols, agreement, time. Of what was asked more than once, a task
or a prompt, the newest answer counts; figures are those of the newest evaluation that has their numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lit_recon.report.drift_figure import drift_figure
from lit_recon.report.evaluations import Evaluation, latest
from lit_recon.report.format import as_count, as_error, as_memory, as_nats, as_perplexity, as_share
from lit_recon.report.hidden_figure import hidden_errors
from lit_recon.report.run_files import finite_or_nan
from lit_recon.report.tables import Cell, Column, Table
from lit_recon.system.units import duration

STATES = {"dense": "dense", "pruned": "pruned", "checkpoint": "this checkpoint"}
UNKNOWN = "–"
PARTS = {
    **{"perplexity": "perplexity", "agreement": "agreement", "drift": "drift"},
    **{"tasks": "tasks", "continuations": "prompts"},
}
TaskKey = tuple[str, str, float | None]


def evaluation_section(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """What evaluation.html.j2 shows, by the names that it has for it.

    Args:
        evaluations: Those of the record, the oldest first.
    """
    tasks = latest(evaluations, "tasks")
    return {
        "evaluations": evaluations,
        "agreement": latest(evaluations, "agreement"),
        "harness": (tasks or {}).get("harness"),
        "continuations": _newest_prompts(evaluations),
        "state_names": STATES,
        "evaluation_tables": evaluation_tables(evaluations),
    }


def evaluation_figures(evaluations: Sequence[Evaluation]) -> dict[str, Callable[[], Figure | None]]:
    """Figures of the newest agreement and drift, by name; None where there is none."""
    agreement, drift = latest(evaluations, "agreement"), latest(evaluations, "drift")
    return {
        "hidden_states": lambda: hidden_errors((agreement or {}).get("hidden") or []),
        "drift": lambda: drift_figure(drift) if drift else None,
    }


def evaluation_tables(evaluations: Sequence[Evaluation]) -> dict[str, Table]:
    """The tables that have rows: perplexities, tasks, and all evaluations."""
    made = {
        "perplexities": _perplexities(evaluations),
        "tasks": _tasks(evaluations),
        "evaluations": _evaluations(evaluations),
    }
    return {name: table for name, table in made.items() if table.rows}


def number_cell(value: Any, as_text: Callable[[float | None], str]) -> Cell:
    """A number that may be unknown, as people read it."""
    number = finite_or_nan(value)
    return Cell(UNKNOWN if value is None else as_text(number), (number,))


def _perplexities(evaluations: Sequence[Evaluation]) -> Table:
    """A row per text: perplexity of each state with its nats, shares of the gap, the protocol in full."""
    parts = [each.parts["perplexity"] for each in evaluations if "perplexity" in each.parts]
    states = [state for state in STATES if any(state in part["perplexity"] for part in parts)]
    gaps = {"gap_recovered": "gap recovered", "gap_recovered_nats": "gap recovered, in nats"}
    known = {key: label for key, label in gaps.items() if any(part.get(key) is not None for part in parts)}
    columns = [Column("text", ("dataset",), False)]
    columns += [Column(STATES[state], (f"perplexity_{state}", f"nats_{state}")) for state in states]
    columns += [Column("nats over dense", ("nats_over_dense",))] if "dense" in states else []
    columns += [Column(label, (key,)) for key, label in known.items()]
    columns.append(Column("protocol", ("protocol",), False))
    rows = []
    for part in parts:
        protocol = part["protocol"]
        text = str(protocol.get("dataset") or UNKNOWN)
        row = [Cell(text, (text,)), *(_with_nats(part, state) for state in states)]
        over = nats_over_dense(part)
        row += [Cell(UNKNOWN if math.isnan(over) else as_nats(over), (over,))] if "dense" in states else []
        row += [number_cell(part.get(key), as_share) for key in known]
        others = {name: value for name, value in protocol.items() if name != "dataset" and value is not None}
        told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in others.items())
        rows.append([*row, Cell(told, (told,))])
    return Table(columns, rows)


def _with_nats(part: Mapping[str, Any], state: str) -> Cell:
    """Perplexity of a state and, in brackets, its nats per token."""
    value, nats = part["perplexity"].get(state), (part.get("nats") or {}).get(state)
    found = number_cell(value, as_perplexity)
    in_nats = finite_or_nan(nats)
    text = found.text if math.isnan(in_nats) else f"{found.text} ({as_nats(in_nats)})"
    return Cell(text, (*found.values, in_nats))


def nats_over_dense(part: Mapping[str, Any]) -> float:
    """Nats per token of the checkpoint over the dense model; NaN where one is unknown."""
    found, dense = (finite_or_nan(part["perplexity"].get(state)) for state in ("checkpoint", "dense"))
    return math.log(found / dense) if found > 0 and dense > 0 else math.nan


def _tasks(evaluations: Sequence[Evaluation]) -> Table:
    """A row per task and metric with the scores of all models, and the means of each evaluation that has a row."""
    newest: dict[TaskKey, dict[str, Mapping[str, Any]]] = {}
    means: list[Mapping[str, float | None]] = []
    for each in reversed(evaluations):
        tasks = each.parts.get("tasks") or {"results": []}
        mine: dict[TaskKey, dict[str, Mapping[str, Any]]] = {}
        for one in tasks["results"]:
            mine.setdefault((one["task"], one["metric"], one.get("fewshot")), {})[one["state"]] = one
        if any(key not in newest for key in mine) and tasks.get("mean"):
            means.insert(0, tasks["mean"])
        newest = {**{key: row for key, row in mine.items() if key not in newest}, **newest}
    found = {state for row in newest.values() for state in row}
    states = [*(state for state in STATES if state in found), *sorted(found - set(STATES))]
    columns = [Column("task", ("task",), False), Column("metric", ("metric",), False)]
    columns += [Column(STATES.get(state, state), (state, f"{state}_standard_error")) for state in states]
    columns += [Column("samples", ("samples",)), Column("shots", ("shots",))]
    rows = [_task_row(key, row, states) for key, row in newest.items()]
    for mean in means:
        about = [Cell("mean", ("mean",)), Cell("acc", ("acc",))]
        scores = [number_cell(mean.get(state), as_share) for state in states]
        blank = Cell("", (math.nan,))
        rows.append([*about, *(Cell(one.text, (*one.values, math.nan)) for one in scores), blank, blank])
    return Table(columns, rows)


def _task_row(key: TaskKey, row: Mapping[str, Mapping[str, Any]], states: Sequence[str]) -> list[Cell]:
    """Scores in one metric of a task, each with its standard error where that is known."""
    task, metric, shots = key
    cells = [Cell(task, (task,)), Cell(metric, (metric,))]
    for state in states:
        one = row.get(state, {})
        error, score = finite_or_nan(one.get("stderr")), number_cell(one.get("value"), as_share)
        text = score.text if math.isnan(error) else f"{score.text} ± {as_share(error)}"
        cells.append(Cell(text, (*score.values, error)))
    asked = next((one["samples"] for one in row.values() if one.get("samples") is not None), None)
    return [*cells, number_cell(asked, as_count), number_cell(shots, as_count)]


def _evaluations(evaluations: Sequence[Evaluation]) -> Table:
    """A row per evaluation: what it measured, the agreement, time and memory."""
    columns = [Column("when", ("when",), False), Column("compared with", ("dense",), False)]
    columns += [Column("measured", ("measured",), False), Column("KL from dense, nats per token", ("kl",))]
    columns += [Column("top-1 agreement", ("top1",)), Column("time", ("seconds",))]
    columns += [Column("of it", ("phases",), False), Column("peak memory", ("peak_memory_bytes",))]
    rows = []
    for each in evaluations:
        agreement, seconds = each.parts.get("agreement") or {}, each.parts.get("seconds") or {}
        texts = [each.time, each.dense]
        texts.append(", ".join(name for part, name in PARTS.items() if part in each.parts))
        phases = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items() if name != "total")
        row = [Cell(text or UNKNOWN, (text,)) for text in texts]
        row += [number_cell(agreement.get("kl"), as_error), number_cell(agreement.get("top1"), as_share)]
        row += [number_cell(seconds.get("total"), lambda value: duration(value or 0.0))]
        memory = number_cell(each.parts.get("peak_memory_bytes"), as_memory)
        rows.append([*row, Cell(phases or UNKNOWN, (phases,)), memory])
    return Table(columns, rows)


def _newest_prompts(evaluations: Sequence[Evaluation]) -> list[Mapping[str, Any]]:
    """The newest continuations of each prompt."""
    newest: dict[str, Mapping[str, Any]] = {}
    for each in evaluations:
        for one in each.parts.get("continuations") or []:
            newest.pop(one["prompt"], None)
            newest[one["prompt"]] = one
    return list(newest.values())
