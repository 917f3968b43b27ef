"""What a person looks at after a run: report.html, one self-contained page, and a table that compares runs.

    python -m lit_recon.report [--markdown] RUN [RUN ...]

redraws the figures and the page of each run from what it left behind and prints the table; nothing is computed again.
"""

import argparse
import base64
import json
import math
import os
import re
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_recon.report.figures import measure, number, read_results, write_figures
from lit_recon.system.atomic_files import replaced
from lit_recon.system.clock import WALK
from lit_recon.system.units import duration

FILES = {
    "checkpoint/": "the reconstructed model and its tokenizer; pruned weights are exact zeros",
    "masks.safetensors": "one bit-packed boolean mask per matrix",
    "results.json": "every number of this page",
    "config.yaml": "the composed configuration",
    "tensorboard/": "the curves of all windows",
    "figures/": "the figures of this page",
}
FACTS = {"Model": ["model"], "Recipe": ["recipe"], "Data and protocol": ["tokens", "protocol"]}
LABELS = {  # where the key of results.json alone does not say it
    "model.covered": "share that can be pruned",
    "recipe.windows": "window",
    "recipe.inputs": "window inputs from",
    "recipe.targets": "window targets from",
    "recipe.statistics": "statistics from",
    "protocol.context": "tokens per sequence",
    "protocol.windows": "sequences",
    "protocol.tokens": "predicted tokens",
    "tokens.calibration": "calibration tokens",
}
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


def write_report(run: Path) -> Path:
    """Draw the figures of a run and write its report.html.

    Args:
        run: The run's folder.

    Returns:
        The page; it needs no other file and no network.

    Raises:
        ValueError: The folder holds no run.
    """
    results = read_results(run)
    images = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in write_figures(run)}
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"ppl": as_perplexity, "share": as_share, "error": as_error}
    templates.filters |= {"duration": duration, "memory": as_memory}
    page = templates.get_template("page.html.j2").render(
        results=results,
        images=images,
        verdict=verdict(results),
        depth=depth_summary(results["windows"]),
        measure=measure(results["windows"]),
        facts={title: facts(results, *keys) for title, keys in FACTS.items()},
        kinds=sparsity_by_kind(results["sparsity"]["by_matrix"]),
        **places(run),
    )
    path = run / "report.html"
    with replaced(path) as file:
        file.write(page.encode())
    return path


def places(run: Path) -> dict[str, Any]:
    """Where things are, in the form in which the page shows them."""
    folder, config = run.resolve(), run / "config.yaml"
    return {
        "run": folder.name,
        "folder": folder.as_posix(),
        "checkpoint": json.dumps((folder / "checkpoint").as_posix(), ensure_ascii=False),  # a Python string
        "logdir": shlex.quote((folder / "tensorboard").as_posix()),
        "files": {name: text for name, text in FILES.items() if (run / name).exists()},
        "config": config.read_text(encoding="utf-8") if config.is_file() else "",
    }


def verdict(results: Mapping[str, Any]) -> tuple[str, str]:
    """Did it work? The kind ("good", "bad" or "neutral") and the sentence of the answer."""
    gap = number(results["gap_recovered"])
    dense, pruned, reconstructed = (results["perplexity"][state] for state in ("dense", "pruned", "reconstructed"))
    numbers = f"perplexity {as_perplexity(pruned)} after pruning, {as_perplexity(reconstructed)} after reconstruction"
    if math.isnan(number(pruned)) or math.isnan(number(reconstructed)):
        return "bad", f"A model broke: {numbers}."
    if math.isnan(gap) or pruned <= dense:
        return "neutral", f"Pruning cost no perplexity here, so there is no gap to recover: {numbers}."
    if gap <= 0:
        return "bad", f"Reconstruction did not help: {numbers}."
    return "good", f"Reconstruction recovered {as_share(gap)} of the perplexity that pruning had cost."


def depth_summary(windows: Sequence[Mapping[str, Any]]) -> str:
    """The held-out errors in a sentence: what is left of them in the median window, and where they are largest."""
    after = {window["name"]: number(window["held_out_after"]) for window in windows}
    before = {window["name"]: number(window["held_out_before"]) for window in windows}
    left = [after[name] / before[name] for name in after if before[name] > 0 and after[name] >= 0]
    if not left:
        return ""
    worst = max(after, key=lambda name: -1 if math.isnan(after[name]) else after[name])
    median = as_share(statistics.median(left))
    return f"The median window keeps {median} of its error; most is left in {worst} ({as_error(after[worst])})."


def facts(results: Mapping[str, Any], *keys: str) -> dict[str, str]:
    """Label and text of everything below some keys of results.json, whatever a version or a user put there."""
    texts = {}
    for key in keys:
        for name, value in results[key].items():
            label = LABELS.get(f"{key}.{name}", name.replace("_", " "))
            if name == "covered":
                texts[label] = as_share(value)
            elif isinstance(value, int) and not isinstance(value, bool):
                texts[label] = f"{value / 1e6:,.1f} M" if value >= 1e7 else f"{value:,}"
            else:
                texts[label] = str(value)
    return texts


def sparsity_by_kind(by_matrix: Mapping[str, float]) -> dict[str, list[float]]:
    """Sparsities of the matrices of one kind, that is, of the same name in different layers and experts."""
    kinds = defaultdict(list)
    for name, sparsity in by_matrix.items():
        kind = re.sub(r"^.*?\.\d+\.", "", name).removesuffix(".weight")
        kinds[re.sub(r"\.\d+\.", ".*.", kind)].append(sparsity)
    return dict(kinds)


def as_perplexity(value: float | None) -> str:
    """Two decimals; a dash for none, and a word for one that overflowed."""
    if value is None:
        return "–"
    return f"{value:,.2f}" if math.isfinite(value) else "not finite"


def as_share(value: float | None) -> str:
    """A percentage with one decimal; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.1%}"


def as_error(value: float | None) -> str:
    """Three significant digits; a dash for none, and a word for one that overflowed."""
    if value is None:
        return "–"
    return f"{value:#.3g}" if math.isfinite(value) else "not finite"


def as_memory(num_bytes: float | None) -> str:
    """Gigabytes (10^9 bytes) with two decimals; a dash for none."""
    return "–" if num_bytes is None else f"{num_bytes / 1e9:.2f} GB"


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the reports of the runs on the command line and print their table; the exit status."""
    about = "Redraw the figures and report.html of finished runs and print one table that compares them."
    parser = argparse.ArgumentParser(prog="python -m lit_recon.report", description=about)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, such as runs/granularity/*")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown, for a README or a paper")
    chosen = parser.parse_args(arguments)
    runs, problems = {}, []
    for run in chosen.runs:
        try:
            runs[run] = read_results(run)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        parser.exit(2, "\n".join(problems) + "\n")
    for run in runs:
        try:
            write_report(run)
        except OSError as error:
            parser.exit(2, f"{run}: the report cannot be written ({error}); expected a folder you may write to.\n")
    named_results = {name: runs[run] for name, run in named(list(runs)).items()}
    if chosen.markdown:
        sys.stdout.write(as_markdown(named_results))
        return 0
    console = Console()
    console.width = max(console.width, 120)  # rich would cut numbers to a narrower terminal's width, or a pipe's, 80
    console.print(comparison(named_results))
    return 0
