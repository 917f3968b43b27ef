"""report.html, the page of one run: did it work, where is the error, what was done, what to do next.

One file with its figures inside; it opens without network. page.html.j2 is its text and layout, in base.html.j2.
"""

import base64
import json
import math
import shlex
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_recon.report.evaluation_section import evaluation_figures, evaluation_section
from lit_recon.report.evaluations import read_evaluations
from lit_recon.report.figures import write_figures
from lit_recon.report.format import LABELS, as_error, as_factor, as_memory, as_perplexity, as_share
from lit_recon.report.heat_map import kind_of, sparsity_by_layer
from lit_recon.report.provenance import provenance_facts
from lit_recon.report.run_files import finite_or_nan, has_units, measure, read_results
from lit_recon.report.shapes import LARGEST
from lit_recon.report.tables import Cell, Column, Table
from lit_recon.report.templates import MADE_BY, relative_link, render
from lit_recon.system.atomic_files import replaced
from lit_recon.system.units import duration

FILES = {
    "checkpoint/": "the reconstructed model and its tokenizer; pruned weights are exact zeros",
    "masks.safetensors": "one bit-packed boolean mask per matrix",
    "results.json": "every number of this page",
    "evaluations.json": "what was evaluated since, all of it",
    "config.yaml": "the composed configuration",
    "tensorboard/": "the curves of the windows",
    "figures/": "the figures of this page",
}
FACTS = {"Model": ["model"], "Recipe": ["recipe"], "Data and protocol": ["tokens", "protocol"]}
INPUTS = ("results.json", "evaluations.json", "config.yaml", "tensorboard")


def is_current(page: Path, shown: Path) -> bool:
    """Whether a page is there already that this version made, after all that it shows was written.

    Args:
        page: The page.
        shown: The folder of the run, or the file, that it shows.
    """
    try:
        drawn = page.stat().st_mtime_ns
        inputs = [shown / name for name in INPUTS] if shown.is_dir() else [shown]
        changed = [path.stat().st_mtime_ns for path in inputs if path.exists()]
        with page.open(encoding="utf-8", errors="replace") as file:
            return max(changed, default=0) < drawn and f'content="{MADE_BY}"' in file.read(2000)
    except OSError:
        return False


def write_report(run: Path, out: Path | None = None) -> Path:
    """Draw the figures of a run and write its report.html.

    Args:
        run: The run's folder.
        out: The folder for page, figures and, there only, the tables of windows and phases; None: the run's.

    Returns:
        The page; it needs no other file and no network.

    Raises:
        ValueError: The folder holds no run.
    """
    results = read_results(run)
    evaluations, unread = read_evaluations(run)
    by_matrix, windows = results["sparsity"]["by_matrix"], results["windows"]
    more = evaluation_figures(evaluations) | {"sparsity": lambda: sparsity_by_layer(by_matrix)}
    out = run if out is None else out
    images = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in write_figures(run, out, more)}
    tables = {"windows": windows_table(windows), "phases": phases_table(results)}
    page = render(
        "page.html.j2",
        results=results,
        images=images,
        verdict=verdict(results),
        depth=depth_summary(windows),
        measure=measure(windows),
        has_units=has_units(windows),
        tries=tries(windows),
        refused=[number for number, window in enumerate(windows) if not window["accepted"]],
        tables=tables,
        facts={title: facts(results, *keys) for title, keys in FACTS.items()},
        kinds=sparsity_by_kind(by_matrix),
        provenance=provenance_facts(results),
        unread=unread,
        **evaluation_section(evaluations),
        **places(run, out),
    )
    return publish(page, tables if run.resolve() != out.resolve() else {}, out)


def publish(page: bytes, tables: Mapping[str, Table], out: Path) -> Path:
    """Write a page into a folder, and its tables as CSV and Markdown next to it; where the page is."""
    files = {f"{name}.csv": table.as_csv() for name, table in tables.items()}
    files |= {f"{name}.md": table.as_markdown() for name, table in tables.items()}
    for name, content in (files | {"report.html": page}).items():
        with replaced(out / name) as file:
            file.write(content)
    return out / "report.html"


def windows_table(windows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of all windows: errors, and of windows that were trained more than once rate and number of tries."""
    labels = {"held_out": "held-out", "typical": "typical", "relative_error": "calibration"}
    parts = [part for part in labels if part != "typical" or has_units(windows)]
    errors = {f"{part}_{when}": f"{labels[part]} {when}" for part in parts for when in ("before", "after")}
    tried = tries(windows)
    columns = [Column("window", ("window",), False), *(Column(label, (key,)) for key, label in errors.items())]
    columns += [Column("rate", ("rate",)), Column("tries", ("tries",))] if tried else []
    columns += [Column("steps", ("steps",)), Column("time", ("seconds",)), Column("outcome", ("accepted",), False)]
    columns.append(Column("note", ("note",), False))
    rows = []
    for index, window in enumerate(windows):
        row = [Cell(window["name"], (window["name"],))]
        row += [Cell(as_error(window.get(key)), (finite_or_nan(window.get(key)),)) for key in errors]
        if tried:
            row.append(Cell(as_factor(window.get("rate")), (finite_or_nan(window.get("rate") or None),)))
            row.append(Cell(str(tried[index]), (tried[index],)))
        steps, seconds = window["steps"], window["seconds"]
        row += [Cell(str(steps), (steps,)), Cell(duration(seconds), (seconds,))]
        outcome = "accepted" if window["accepted"] else "not accepted"
        rows.append([*row, *(Cell(text, (text,)) for text in (outcome, window.get("note") or ""))])
    return Table(columns, rows)


def phases_table(results: Mapping[str, Any]) -> Table:
    """Seconds of each phase and of the whole run, their share, and peak memory in bytes where it is known."""
    total, peaks = results["seconds"]["total"], results.get("phase_peak_memory_bytes") or {}
    columns = [Column("phase", ("phase",), False), Column("time", ("seconds",)), Column("share", ("share",))]
    columns.append(Column("peak memory", ("peak_memory_bytes",)))
    rows = []
    for phase, seconds in results["seconds"].items():
        share = seconds / total if total else 0.0
        peak = results["peak_memory_bytes"] if phase == "total" else peaks.get(phase)
        cells = [Cell(phase, (phase,)), Cell(duration(seconds), (seconds,)), Cell(f"{share:.1%}", (share,))]
        rows.append([*cells, Cell(as_memory(peak), (finite_or_nan(peak),))])
    return Table(columns, rows)


def places(run: Path, out: Path) -> dict[str, Any]:
    """Paths of a run and its configuration, in the form in which the page in `out` shows them."""
    folder, config = run.resolve(), run / "config.yaml"
    return {
        "title": folder.name,
        "at": "" if folder == out.resolve() else f"{relative_link(folder, out)}/",
        "folder": folder.as_posix(),
        "quoted_run": shlex.quote(folder.as_posix()),
        "checkpoint_of_run": shlex.quote(f"checkpoint={folder.as_posix()}"),
        "checkpoint": json.dumps((folder / "checkpoint").as_posix(), ensure_ascii=False),  # a Python string
        "logdir": shlex.quote((folder / "tensorboard").as_posix()),
        "files": {name: text for name, text in FILES.items() if (run / name).exists()},
        "config": config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
    }


def verdict(results: Mapping[str, Any]) -> tuple[str, str]:
    """Verdict on a run: "good", "bad" or "neutral", and a sentence for the reader."""
    gap = finite_or_nan(results["gap_recovered"])
    dense, pruned, reconstructed = (results["perplexity"][state] for state in ("dense", "pruned", "reconstructed"))
    numbers = f"perplexity {as_perplexity(pruned)} after pruning, {as_perplexity(reconstructed)} after reconstruction"
    if math.isnan(finite_or_nan(pruned)) or math.isnan(finite_or_nan(reconstructed)):
        return "bad", f"A model broke: {numbers}."
    if math.isnan(gap) or pruned <= dense:
        return "neutral", f"Pruning cost no perplexity here, so there is no gap to recover: {numbers}."
    if gap <= 0:
        return "bad", f"Reconstruction did not help: {numbers}."
    return "good", f"Reconstruction recovered {as_share(gap)} of the perplexity that pruning had cost."


def depth_summary(windows: Sequence[Mapping[str, Any]]) -> str:
    """Held-out errors in a sentence: the share that is left in the median window, and the window with the largest."""
    after = {window["name"]: finite_or_nan(window["held_out_after"]) for window in windows}
    before = {window["name"]: finite_or_nan(window["held_out_before"]) for window in windows}
    left = [after[name] / before[name] for name in after if before[name] > 0 and after[name] >= 0]
    if not left:
        return ""
    worst = max(after, key=lambda name: -1 if math.isnan(after[name]) else after[name])
    median = as_share(statistics.median(left))
    return f"The median window keeps {median} of its error; most is left in {worst} ({as_error(after[worst])})."


def tries(windows: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many times each window was trained; empty if all were once, at the learning rate that was asked for.

    A start from a solution is among the tries of results.json, at rate 0.
    """
    numbers = [sum(bool(one and one[0]) for one in window.get("tries") or ()) for window in windows]
    rates = {window.get("rate") for window in windows}
    return numbers if max(numbers, default=0) > 1 or rates - {None, 0, 1} else []


def facts(results: Mapping[str, Any], *keys: str) -> dict[str, str]:
    """Labels and texts of all entries below some keys of results.json, whatever a version or a user put there."""
    texts = {}
    for key in keys:
        for name, value in ((name, value) for name, value in results[key].items() if value is not None):
            label = LABELS.get(f"{key}.{name}", name.replace("_", " "))
            if name == "covered":
                texts[label] = as_share(value)
            elif isinstance(value, int) and not isinstance(value, bool) and value < LARGEST:
                texts[label] = f"{value / 1e6:,.1f} M" if value >= 1e7 else f"{value:,}"
            else:
                texts[label] = str(value)
    return texts


def sparsity_by_kind(by_matrix: Mapping[str, float]) -> dict[str, list[float]]:
    """Sparsities by kind of matrix."""
    kinds = defaultdict(list)
    for name, sparsity in by_matrix.items():
        kinds[kind_of(name)].append(sparsity)
    return dict(kinds)
