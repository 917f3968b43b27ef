"""Tables of the README, made again from the folders of the runs that they tell of.

    python .github/readme_tables.py [--runs runs] [--check]

A table stands between two comments, of which the first says how it is made and of which runs below that folder:

    <!-- runs: criteria criteria/smollm2_unstructured/* -->
    ...
    <!-- /runs -->

Tables whose runs are not there stay as they are. --check changes nothing and ends with 1 if a table is another one.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_recon.report.format import as_error, as_memory, as_perplexity, as_share
from lit_recon.report.run_files import finite_or_nan, read_results
from lit_recon.system.clock import WALK
from lit_recon.system.units import duration

README = Path(__file__).parents[1] / "README.md"
_TABLE = re.compile(r"(<!-- runs: (\w+) (\S+) -->\n).*?(<!-- /runs -->)", re.DOTALL)
Row = Sequence[str]


def criteria(runs: Mapping[Path, Mapping[str, Any]]) -> list[Row]:
    """A row for each criterion, in perplexity and in nats over the dense model."""
    rows: list[Row] = [["criterion", "pruned", "reconstructed", "nats over dense, pruned", "reconstructed"]]
    for results in runs.values():
        recipe, found = results["recipe"], results["perplexity"]
        nats = [math.log(finite_or_nan(found[state]) / found["dense"]) for state in ("pruned", "reconstructed")]
        name = " with ".join(filter(None, (recipe["criterion"], recipe.get("refine", "").lower())))
        rows.append([name, *map(as_perplexity, (found["pruned"], found["reconstructed"])), *(f"{n:.2f}" for n in nats)])
    return rows


def windows(runs: Mapping[Path, Mapping[str, Any]]) -> list[Row]:
    """A row for each window kind: quality, time and memory."""
    rows: list[Row] = [
        ["window", "reconstructed", "recovered, in nats", "relative error", "walk", "peak memory, walk", "planned"]
    ]
    for run, results in runs.items():
        planned = (results.get("predicted") or {}).get("walk_peak_memory_bytes")
        rows.append(
            [
                f"{results['recipe']['windows']} (`{run.name}`)",
                as_perplexity(results["perplexity"]["reconstructed"]),
                as_share(results["gap_recovered_nats"]),
                as_error((results.get("relative_error") or {}).get("reconstructed")),
                duration(sum(results["seconds"][phase] for phase in WALK)),
                as_memory(results.get("walk_peak_memory_bytes")),
                as_memory(planned),
            ]
        )
    return rows


def models(runs: Mapping[Path, Mapping[str, Any]]) -> list[Row]:
    """A row for each model."""
    rows: list[Row] = [["model", "dense", "pruned", "reconstructed", "recovered, in nats"]]
    for results in runs.values():
        found = (results["perplexity"][state] for state in ("dense", "pruned", "reconstructed"))
        rows.append([results["model"]["name"], *map(as_perplexity, found), as_share(results["gap_recovered_nats"])])
    return rows


TABLES: dict[str, Callable[[Mapping[Path, Mapping[str, Any]]], list[Row]]] = {
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
        header, *rows = TABLES[kind]({path: read_results(path) for path in paths})
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
    except (ValueError, json.JSONDecodeError) as error:
        parser.exit(2, f"{error}\n")
    if made != text and not chosen.check:
        README.write_text(made, encoding="utf-8")
    sys.stdout.write("the same\n" if made == text else "others\n" if chosen.check else f"{README} renewed\n")
    return int(chosen.check and made != text)


if __name__ == "__main__":
    sys.exit(main())
