"""report.html, the page of one run: did it work, where is the error, what was done, what to do next.

One file with its figures inside; it opens without network. page.html.j2 is its text and layout.
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

from lit_recon import __version__
from lit_recon.report.drift_figure import drift_figure
from lit_recon.report.evaluations import latest, read_evaluations
from lit_recon.report.figures import write_figures
from lit_recon.report.format import LABELS, as_error, as_memory, as_perplexity, as_share
from lit_recon.report.heat_map import kind_of, sparsity_by_layer
from lit_recon.report.hidden_figure import hidden_errors
from lit_recon.report.provenance import provenance_facts
from lit_recon.report.run_files import finite_or_nan, has_units, measure, read_results
from lit_recon.report.shapes import LARGEST
from lit_recon.report.tables import Cell, Column, Table
from lit_recon.report.templates import relative_link, render
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


MADE_BY = f"lit_recon {__version__}"
INPUTS = ("results.json", "evaluations.json", "config.yaml", "tensorboard")


def is_current(run: Path) -> bool:
    """Whether a run has a page already that this version made, after all that it shows was written."""
    page = run / "report.html"
    try:
        drawn = page.stat().st_mtime_ns
        changed = [path.stat().st_mtime_ns for name in INPUTS if (path := run / name).exists()]
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
    by_matrix = results["sparsity"]["by_matrix"]
    agreement, drift = latest(evaluations, "agreement"), latest(evaluations, "drift")
    more = {
        "hidden_states": lambda: hidden_errors((agreement or {}).get("hidden") or []),
        "drift": lambda: drift_figure(drift) if drift else None,
        "sparsity": lambda: sparsity_by_layer(by_matrix),
    }
    out = run if out is None else out
    images = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in write_figures(run, out, more)}
    page = render(
        "page.html.j2",
        results=results,
        images=images,
        verdict=verdict(results),
        depth=depth_summary(results["windows"]),
        measure=measure(results["windows"]),
        has_units=has_units(results["windows"]),
        tries=tries(results["windows"]),
        facts={title: facts(results, *keys) for title, keys in FACTS.items()},
        kinds=sparsity_by_kind(by_matrix),
        phases=phases_table(results),
        provenance=provenance_facts(results),
        evaluations=evaluations,
        unread=unread,
        protocols=[each.parts["perplexity"] for each in evaluations if "perplexity" in each.parts],
        agreement=agreement,
        tasks=latest(evaluations, "tasks"),
        continuations=latest(evaluations, "continuations"),
        made_by=MADE_BY,
        **places(run, out),
    )
    is_apart = run.resolve() != out.resolve()
    tables = {"windows": windows_table(results["windows"]), "phases": phases_table(results)} if is_apart else {}
    files = {f"{name}.csv": table.as_csv() for name, table in tables.items()}
    files |= {f"{name}.md": table.as_markdown() for name, table in tables.items()}
    for name, content in (files | {"report.html": page}).items():
        with replaced(out / name) as file:
            file.write(content)
    return out / "report.html"


def windows_table(windows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of all windows."""
    keys = [f"{part}_{when}" for part in ("held_out", "typical", "relative_error") for when in ("before", "after")]
    keys += ["rate", "steps", "seconds"]
    columns = [Column("window", ("window",), False), *(Column(key.replace("_", " "), (key,)) for key in keys)]
    columns += [Column("outcome", ("accepted",), False), Column("note", ("note",), False)]
    rows = []
    for window in windows:
        texts = [window["name"], "accepted" if window["accepted"] else "not accepted", window.get("note") or ""]
        name, *others = (Cell(text, (text,)) for text in texts)
        values = [finite_or_nan(window.get(key)) for key in keys]
        rows.append([name, *(Cell("–" if math.isnan(one) else f"{one:.4g}", (one,)) for one in values), *others])
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
        "run": folder.name,
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
