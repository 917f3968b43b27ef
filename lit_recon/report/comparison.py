"""The table that compares runs, one row each: for the terminal, and in Markdown."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from lit_recon.report.format import LABELS, as_error, as_memory, as_perplexity, as_share
from lit_recon.system.clock import WALK
from lit_recon.system.units import duration

DEFAULT_MODULE = "ReconstructionModule"
COLUMNS = {  # of the comparison: as a line of text, and on the terminal
    "run": "run",
    "window": "window",
    "perplexity, dense": "PPL\n\ndense",
    "perplexity, pruned": "\n\npruned",
    "perplexity, reconstructed": "\nrecon-\nstructed",
    "share of the gap": "share\nof the\ngap",
    "relative error": "rel.\nerror",
    "time, walk": "time\n\nwalk",
    "time, total": "\n\ntotal",
    "peak GB, walk": "peak GB\n\nwalk",
    "peak GB, planned": "\n\nplan",
    "peak GB, total": "\n\ntotal",
}


def named(runs: Sequence[Path]) -> dict[str, Path]:
    """The runs by the shortest name that tells them apart: their path below the folder that holds them all."""
    folders = [Path(os.path.abspath(run)) for run in runs]
    parent = os.path.commonpath([folder.parent for folder in folders])
    return {folder.relative_to(parent).as_posix(): run for folder, run in zip(folders, runs, strict=True)}


def settings(results: Mapping[str, Any]) -> dict[str, str]:
    """What a run was, each setting in words that need no label."""
    recipe, protocol = results["recipe"], results["protocol"]
    words = {key: f"{LABELS.get(f'recipe.{key}', key.replace('_', ' '))} {value}" for key, value in recipe.items()}
    words |= {key: recipe[key] for key in ("criterion", "pattern", "windows", "module") if key in recipe}
    return words | {
        "model": results["model"]["name"],
        "calibration": f"{results['tokens']['calibration']:,} calibration tokens",
        "evaluation": f"perplexity on {protocol['dataset']}, {protocol['windows']} x {protocol['context']} tokens",
        "seed": f"seed {results['seed']}",
    }


def told_apart(runs: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, str]]:
    """The main settings that all runs share, and what each run was: its window, and what differs between the runs."""
    described = {name: settings(results) for name, results in runs.items()}
    values = defaultdict(set)
    for one in described.values():
        for key, text in one.items():
            values[key].add(text)
    shared = {key: texts.pop() for key, texts in values.items() if len(texts) == 1 and key != "module"}
    what = {}
    for name, one in described.items():
        told = [one[key] for key in one if key not in shared and key != "windows" and one[key] != DEFAULT_MODULE]
        what[name] = ", ".join([one["windows"], *told])
    main = ("model", "criterion", "pattern", "calibration", "evaluation")
    return ", ".join(shared[key] for key in main if key in shared), what


def cells(results: Mapping[str, Any]) -> list[str]:
    """The numbers of a run as COLUMNS has them."""
    seconds, error = results["seconds"], results.get("relative_error") or {}
    return [
        *(as_perplexity(results["perplexity"][state]) for state in ("dense", "pruned", "reconstructed")),
        as_share(results["gap_recovered"]),
        as_error(error.get("reconstructed")),
        duration(sum(seconds[phase] for phase in WALK)),
        duration(seconds["total"]),
        as_memory(results.get("walk_peak_memory_bytes")).removesuffix(" GB"),
        as_memory((results.get("predicted") or {}).get("walk_peak_memory_bytes")).removesuffix(" GB"),
        as_memory(results["peak_memory_bytes"]).removesuffix(" GB"),
    ]


def comparison(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per run (results.json by the run's name); what it was stands below its name, so that 120 columns do."""
    shared, what = told_apart(runs)
    table = Table(title=Text(shared), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run\nwindow", overflow="fold", vertical="bottom")
    for header in list(COLUMNS.values())[2:]:
        table.add_column(header, justify="right", no_wrap=True)
    for name, results in runs.items():
        table.add_row(Text.assemble((name, "bold"), f"\n{what[name]}"), *cells(results))  # Text: no markup in names
    return table


def as_markdown(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparison as a table of GitHub's Markdown, to be put below what all runs share."""
    _, what = told_apart(runs)
    rows = [list(COLUMNS), ["---", "---", *["---:"] * (len(COLUMNS) - 2)]]
    for name, results in runs.items():
        rows.append([re.sub(r"([\\|*`<\[~])", r"\\\1", text) for text in (name, what[name], *cells(results))])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
