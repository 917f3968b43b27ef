"""Tables of the README, made again from the folders of the runs that they tell of.

    python .github/readme_tables.py [--runs runs] [--check]

A table stands between two comments, of which the first says how it is made and of which runs below that folder:

    <!-- runs: criteria criteria/smollm2_unstructured/* -->
    ...
    <!-- /runs -->

Tables whose runs are not there stay as they are. --check changes nothing and ends with 1 if a table is another one.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_recon.report.format import as_memory, as_perplexity
from lit_recon.report.measures import FINAL, GAP_IN_NATS, NATS, NATS_PRUNED, PERPLEXITY, WALK_MEMORY, WALK_SECONDS
from lit_recon.report.runs import Run, read_run

README = Path(__file__).parents[1] / "README.md"
_TABLE = re.compile(r"(<!-- runs: (\w+) (\S+) -->\n).*?(<!-- /runs -->)", re.DOTALL)
Row = Sequence[str]


def criteria(runs: Sequence[Run]) -> list[Row]:
    """A row for each criterion, in perplexity and in nats over the dense model."""
    rows: list[Row] = [["criterion", "pruned", "reconstructed", "nats over dense, pruned", "reconstructed"]]
    for run in runs:
        recipe = _results(run)["recipe"]
        name = " with ".join(filter(None, (recipe["criterion"], recipe.get("refine", "").lower())))
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


def _results(run: Run) -> Mapping[str, Any]:
    if run.results is None:
        raise ValueError(run.message)
    return run.results


def _perplexities(run: Run, *states: str) -> list[str]:
    return [as_perplexity(_results(run)["perplexity"][state]) for state in states]


TABLES: dict[str, Callable[[Sequence[Run]], list[Row]]] = {
    "criteria": criteria,
    "windows": windows,
    "models": models,
}


def renewed(text: str, folder: Path) -> str:
    """A README with the tables whose runs are in a folder.

    Raises:
        ValueError: A table is of a kind that there is not, or a run cannot be read.
    """

    def table(found: re.Match[str]) -> str:
        opening, kind, pattern, closing = found.groups()
        if kind not in TABLES:
            raise ValueError(f"{opening.strip()}: expected one of {', '.join(TABLES)}.")
        paths = sorted(path.parent for path in folder.glob(f"{pattern}/results.json"))
        if not paths:
            return found[0]
        header, *rows = TABLES[kind]([read_run(path) for path in paths])
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        return opening + "".join(f"| {' | '.join(line)} |\n" for line in lines) + closing

    return _TABLE.sub(table, text)


def main() -> int:
    """Renew README.md, or check it."""
    parser = argparse.ArgumentParser(description="Make the tables of the README again from the folders of runs.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is another one")
    chosen = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    try:
        made = renewed(text, chosen.runs)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    if made != text and not chosen.check:
        README.write_text(made, encoding="utf-8")
    sys.stdout.write("the same\n" if made == text else "others\n" if chosen.check else f"{README} renewed\n")
    return int(chosen.check and made != text)


if __name__ == "__main__":
    sys.exit(main())
