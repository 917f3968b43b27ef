"""Tables of the README, made again from the folders of the runs that they tell of.

    python .github/readme_tables.py [--runs runs] [--check] [NAME=FOLDER ...]

A table stands between two comments, of which the first says how it is made and of which runs:

    <!-- runs: criteria criteria/smollm2_unstructured/* -->
    ...
    <!-- /runs -->

Runs are looked for by their names below --runs; NAME=FOLDER says where those are whose name is or begins with NAME
(default=runs/2026-11-28_14-47-17, granularity=/nights/granularity). A table of runs (TABLES) has a row for each; of one
of findings (FINDINGS) the last cells of each row are sentences or numbers of several runs, and the others are the
README's own. What has no run stays as it is. --check changes nothing and ends with 1 if a table is another one.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_recon.report.format import as_memory, as_perplexity
from lit_recon.report.measures import FINAL, GAP_IN_NATS, NATS, NATS_PRUNED, PERPLEXITY, WALK_MEMORY, WALK_SECONDS
from lit_recon.report.runs import Run, read_run

README = Path(__file__).parents[1] / "README.md"
_TABLE = re.compile(r"(<!-- runs: (\w+) (\S+) -->\n)(.*?)(<!-- /runs -->)", re.DOTALL)
_LARGE = 1e5  # perplexities from which on two decimals say nothing
_WORDS = {"Random": "random", "Magnitude": "magnitude"}  # criteria that are no names
Row = Sequence[str]


def criteria(runs: Sequence[Run]) -> list[Row]:
    """A row for each criterion, the worst first, in perplexity and in nats over the dense model."""
    rows: list[Row] = [["criterion", "pruned", "reconstructed", "nats over dense, pruned", "reconstructed"]]
    for run in sorted(runs, key=lambda run: -NATS.of(run) if math.isfinite(NATS.of(run)) else -math.inf):
        recipe = _results(run)["recipe"]
        criterion = _WORDS.get(recipe["criterion"], recipe["criterion"])
        name = " with ".join(filter(None, (criterion, recipe.get("refine", "").lower())))
        nats = (f"{measure.of(run):.2f}" for measure in (NATS_PRUNED, NATS))
        rows.append([name, *_perplexities(run, "pruned", "reconstructed"), *nats])
    return rows


def windows(runs: Sequence[Run]) -> list[Row]:
    """A row for each window kind: quality, time and memory."""
    measures = (PERPLEXITY, GAP_IN_NATS, FINAL, WALK_SECONDS, WALK_MEMORY)
    rows: list[Row] = [
        ["window", "reconstructed", "recovered, in nats", "relative error", "walk", "peak memory, walk", "planned"]
    ]
    for run in runs:
        planned = (_results(run).get("predicted") or {}).get("walk_peak_memory_bytes")
        kind = f"{_results(run)['recipe']['windows']} (`{run.folder.name}`)"
        rows.append([kind, *(measure.text_of(run) for measure in measures), as_memory(planned)])
    return rows


def models(runs: Sequence[Run]) -> list[Row]:
    """A row for each model."""
    rows: list[Row] = [["model", "dense", "pruned", "reconstructed", "recovered, in nats"]]
    for run in runs:
        perplexities = _perplexities(run, "dense", "pruned", "reconstructed")
        rows.append([_results(run)["model"]["name"], *perplexities, GAP_IN_NATS.text_of(run)])
    return rows


TABLES: dict[str, Callable[[Sequence[Run]], list[Row]]] = {
    "criteria": criteria,
    "windows": windows,
    "models": models,
}
# By the kind of the table and the beginning of a row: its last cells, with numbers of runs by their names.
FINDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "findings": {
        "reconstruction wins back": (
            "dense {default.dense}, pruned {default.pruned}, reconstructed {default.reconstructed} on {default.tokens} "
            "tokens, {default.memory} of memory",
        ),
        "as well as global retraining": (
            "on {granularity/1_epochs/block.tokens} tokens, pruned {granularity/1_epochs/block.pruned}: "
            "{granularity/1_epochs/block.reconstructed} by blocks at {granularity/1_epochs/block.memory}; "
            "{global.reconstructed} all layers at once at {global.memory}",
        ),
        "the window's size hardly matters": (
            "on {granularity/1_epochs/block.tokens} tokens, pruned {granularity/1_epochs/block.pruned}: half "
            "{granularity/1_epochs/half.reconstructed}, block {granularity/1_epochs/block.reconstructed}, four blocks "
            "{granularity/1_epochs/blocks_4.reconstructed}, all layers at once "
            "{granularity/1_epochs/model.reconstructed}; single matrices "
            "{granularity/1_epochs/matrix_gradient.reconstructed}, solved exactly "
            "{granularity/1_epochs/matrix_least_squares.reconstructed}",
        ),
        "the criterion matters less": (
            "magnitude {criteria/smollm2_unstructured/magnitude.pruned} and SparseGPT "
            "{criteria/smollm2_unstructured/sparsegpt.pruned} become "
            "{criteria/smollm2_unstructured/magnitude.reconstructed} and "
            "{criteria/smollm2_unstructured/sparsegpt.reconstructed}",
        ),
    },
    "recovered": {
        "local reconstruction recovers": ("{default.pruned}", "{default.reconstructed}"),
        "the same without correcting": ("{dense_inputs.pruned}", "{dense_inputs.reconstructed}"),
        "also for 2:4 sparsity": ("{n_m.pruned}", "{n_m.reconstructed}"),
    },
}


class Places:
    """Where runs are.

    Args:
        folder: The folder of all runs.
        named: Other folders, by the name or the beginning of the names of what they hold.
    """

    def __init__(self, folder: Path, named: Mapping[str, Path] | None = None) -> None:
        self.folder, self.named = folder, dict(named or {})

    def runs(self, pattern: str) -> list[Run]:
        """The finished runs whose names match a pattern, in the order of their folders."""
        folder, rest = self.folder, pattern
        for name, place in self.named.items():
            if pattern == name or pattern.startswith(f"{name}/"):
                folder, rest = place, pattern[len(name) :].lstrip("/")
        found = sorted(path.parent for path in folder.glob(f"{rest}/results.json" if rest else "results.json"))
        return [read_run(path) for path in found]


class _Numbers:
    """A run's numbers as a sentence of the README has them."""

    def __init__(self, run: Run) -> None:
        results = _results(run)
        self.dense, self.pruned, self.reconstructed = _perplexities(run, "dense", "pruned", "reconstructed")
        self.tokens = f"{sum(results['tokens'].values()) / 1000:.0f}k"
        self.memory = f"{results['peak_memory_bytes'] / 1e9:.1f} GB"


def _results(run: Run) -> Mapping[str, Any]:
    if run.results is None:
        raise ValueError(run.message)
    return run.results


def _perplexities(run: Run, *states: str) -> list[str]:
    return [_perplexity(_results(run)["perplexity"][state]) for state in states]


def _perplexity(value: float | None) -> str:
    """A perplexity, of which a large one has two digits: 2.7e7."""
    if value is None or not _LARGE <= value < math.inf:
        return as_perplexity(value)
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"


def _findings(kind: str, old: str, places: Places) -> str:
    """A table of findings with the cells whose runs are there.

    Raises:
        ValueError: A row of the table is unknown, or one that is known is not in it.
    """
    lines, left = old.splitlines(keepends=True), dict(FINDINGS[kind])
    for index, line in enumerate(lines[2:], start=2):
        cells = re.split(r" ?(?<!\\)\| ?", line.strip().strip("|").strip())
        known = next((name for name in left if cells[0].startswith(name)), None)
        if known is None:
            raise ValueError(f"README.md, {kind}: the row {cells[0]!r} is not one of {', '.join(FINDINGS[kind])}.")
        templates = left.pop(known)
        names = set(re.findall(r"\{([^.}]+)\.", "".join(templates)))
        runs = {name: places.runs(name) for name in names}
        if all(runs.values()):
            numbers = {name: _Numbers(found[0]) for name, found in runs.items()}
            made = [template.format_map(numbers) for template in templates]
            lines[index] = f"| {' | '.join([*cells[: -len(made)], *made])} |\n"
    if left:
        raise ValueError(f"README.md, {kind}: no row begins with {', '.join(left)}.")
    return "".join(lines)


def renewed(text: str, places: Places) -> str:
    """A README with the tables whose runs are there.

    Raises:
        ValueError: A table is of a kind that there is not, or a run cannot be read.
    """

    def table(found: re.Match[str]) -> str:
        opening, kind, pattern, old, closing = found.groups()
        if kind in FINDINGS:
            return opening + _findings(kind, old, places) + closing
        if kind not in TABLES:
            raise ValueError(f"{opening.strip()}: expected one of {', '.join([*TABLES, *FINDINGS])}.")
        runs = places.runs(pattern)
        if not runs:
            return found[0]
        header, *rows = TABLES[kind](runs)
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        return opening + "".join(f"| {' | '.join(line)} |\n" for line in lines) + closing

    return _TABLE.sub(table, text)


def _named(word: str) -> tuple[str, Path]:
    """NAME=FOLDER of the command line."""
    name, equals, folder = word.partition("=")
    if not equals or not name or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{word}: expected NAME=FOLDER, with a folder that is there")
    return name, Path(folder)


def main() -> int:
    """Renew README.md, or check it."""
    parser = argparse.ArgumentParser(description="Make the tables of the README again from the folders of runs.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is another one")
    parser.add_argument("named", metavar="NAME=FOLDER", nargs="*", type=_named, help="where runs of a name are")
    chosen = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    try:
        made = renewed(text, Places(chosen.runs, dict(chosen.named)))
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    if made != text and not chosen.check:
        README.write_text(made, encoding="utf-8")
    sys.stdout.write("the same\n" if made == text else "others\n" if chosen.check else f"{README} renewed\n")
    return int(chosen.check and made != text)


if __name__ == "__main__":
    sys.exit(main())
