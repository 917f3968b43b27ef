"""The table that compares runs, one row per run, for the terminal and in Markdown.

A row names the settings in which its run differs from the others, so that a study needs no legend; settings that all
runs share stand above the table.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.table import Table
from rich.text import Text

from lit_recon.report.evaluations import protocol_text
from lit_recon.report.format import LABELS, as_error, as_memory, as_perplexity, as_share
from lit_recon.system.clock import WALK
from lit_recon.system.units import duration

Found = TypeVar("Found")
DEFAULT_MODULES = {"MaskedWeights", "ReconstructionModule"}  # not named in rows; the second is its name up to 0.2.0
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


def by_short_name(runs: Mapping[Path, Found]) -> dict[str, Found]:
    """What was found in folders by the short name of each: its path below the folder that holds all.

    Args:
        runs: Such as results.json, by the folder of the run.
    """
    parent = common_folder(runs)
    return {Path(os.path.abspath(run)).relative_to(parent).as_posix(): found for run, found in runs.items()}


def common_folder(runs: Iterable[Path]) -> Path:
    """The deepest folder that holds all runs, as an absolute path."""
    return Path(os.path.commonpath([Path(os.path.abspath(run)).parent for run in runs]))


def settings(results: Mapping[str, Any]) -> dict[str, str]:
    """Settings of a run, each as text that needs no label; what refined the masks is part of the criterion."""
    recipe = results["recipe"]
    texts = {key: f"{LABELS.get(f'recipe.{key}', key.replace('_', ' '))} {value}" for key, value in recipe.items()}
    texts.pop("refine", None)
    texts |= {key: recipe[key] for key in ("pattern", "windows", "module") if key in recipe}
    texts["criterion"] = " + ".join(recipe[key] for key in ("criterion", "refine") if recipe.get(key))
    if results.get("relative_error"):  # of two versions they do not compare: until 0.4 there was no typical error
        unit = "median energy" if results.get("typical_error") else "variance"
        texts["unit"] = f"error in units of the dense states' {unit}"
    return texts | {
        "model": results["model"]["name"],
        "calibration": f"{sum(results['tokens'].values()):,} calibration tokens",
        "evaluation": f"perplexity on {protocol_text(results['protocol'])}",
        "seed": f"seed {results['seed']}",
    }


def shared_and_different(by_run: Mapping[str, Mapping[str, str]]) -> tuple[str, dict[str, str]]:
    """Settings of runs as text: the main ones that all runs share, and for each run its window and what differs.

    Args:
        by_run: The settings of each run by its name.
    """
    values = defaultdict(set)
    for texts in by_run.values():
        for key, text in texts.items():
            values[key].add(text)
    shared = {key: found.pop() for key, found in values.items() if len(found) == 1 and key != "module"}
    different = {}
    for name, texts in by_run.items():
        named = [text for key, text in texts.items() if key not in {*shared, "windows"} and text not in DEFAULT_MODULES]
        different[name] = ", ".join([texts["windows"], *named])
    main = ("model", "criterion", "pattern", "calibration", "evaluation")
    return ", ".join(shared[key] for key in main if key in shared), different


def cells(results: Mapping[str, Any]) -> list[str]:
    """Numbers of a run as text, in the order of COLUMNS."""
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


def comparison(runs: Mapping[str, Mapping[str, Any] | list[str]]) -> Table:
    """Table for the terminal, 120 columns wide; the settings of a run, or its state, stand below its name.

    Args:
        runs: By the name of the run its results.json; of a run that has none its state, and texts for the columns after
            that as far as they are known.
    """
    shared, rows = _rows(runs)
    table = Table(title=Text(shared), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run\nwindow", overflow="fold", vertical="bottom")
    for header in list(COLUMNS.values())[2:]:
        table.add_column(header, justify="right", no_wrap=True)
    for name, different, *numbers in rows:
        # Text: what looks like markup in a name is not read as markup
        table.add_row(Text.assemble((name, "bold"), f"\n{different}"), *numbers)
    return table


def as_markdown(runs: Mapping[str, Mapping[str, Any] | list[str]]) -> str:
    """Table in GitHub's Markdown, without the settings that all runs share.

    Args:
        runs: As for `comparison`.
    """
    rows = [list(COLUMNS), ["---", "---", *["---:"] * (len(COLUMNS) - 2)]]
    rows += [[escaped(text) for text in row] for row in _rows(runs)[1]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _rows(runs: Mapping[str, Mapping[str, Any] | list[str]]) -> tuple[str, list[list[str]]]:
    """The settings that all runs share, and a row of texts for each."""
    results = {name: found for name, found in runs.items() if isinstance(found, Mapping)}
    shared, different = shared_and_different({name: settings(found) for name, found in results.items()})
    others = {name: [name, *found] for name, found in runs.items() if not isinstance(found, Mapping)}
    states = {name: row + ["–"] * (len(COLUMNS) - len(row)) for name, row in others.items()}
    rows = {name: [name, different[name], *cells(found)] for name, found in results.items()} | states
    return shared, [rows[name] for name in runs]


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    text = re.sub(r"([\\|*`<&\[~$])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
