"""The command that draws the reports of finished runs again and compares the runs in a table.

    python -m lit_recon.report [--markdown] RUN [RUN ...]

Figures and page of each run come from the files that it left; nothing is computed again and no model is loaded.
Runs that differ in nothing but the criterion are a study (study.py): their spread is printed below the table, and a
figure is drawn beside them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_recon.report.run_files import is_study_figure, read_results
from lit_recon.system.terminal import readable_output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lit_recon.report.study import Study


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of each run on the command line, then print the table of all and the spread of studies.

    Args:
        arguments: The command line without the program's name; None takes that of the process.

    Returns:
        The exit status, 0.

    Raises:
        SystemExit: With status 2 where a folder holds no finished run (then nothing is written), or a report or figure
            cannot be written, with a message on stderr; with status 0 after `--help`.
    """
    about = "Redraw the figures and report.html of finished runs and print one table that compares them."
    parser = argparse.ArgumentParser(prog="python -m lit_recon.report", description=about)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, such as runs/granularity/*")
    parser.add_argument("--markdown", action="store_true", help="print in Markdown, for a README or a paper")
    chosen = parser.parse_args(arguments)
    readable_output()
    runs = _read([path for path in chosen.runs if not is_study_figure(path)] or chosen.runs, parser)

    # Here and not at the top: matplotlib, jinja2 and rich take a second, which --help and messages do not need.
    from lit_recon.report.comparison import as_markdown, by_short_name, comparison
    from lit_recon.report.page import write_report
    from lit_recon.report.study import spread_markdown, spread_table, studies

    for run in runs:
        try:
            write_report(run)
        except OSError as error:
            parser.exit(2, f"{run}: the report cannot be written ({error}); expected a folder you may write to.\n")
    named_results, found = by_short_name(runs), studies(runs)
    if chosen.markdown:
        sys.stdout.write("\n".join([as_markdown(named_results), *map(spread_markdown, found)]))
    else:
        _print(comparison(named_results), *map(spread_table, found))
    for study in found:
        _draw(study, parser)
        path = study.figure.as_posix()
        sys.stdout.write(f"\n![nats of each criterion](<{path}>)\n" if chosen.markdown else f"Figure: {path}\n")
    return 0


def _read(folders: Sequence[Path], parser: argparse.ArgumentParser) -> dict[Path, dict[str, Any]]:
    """The results of each run, by its folder; if any cannot be read, exit with the problems of all."""
    runs, problems = {}, []
    for run in folders:
        try:
            runs[run] = read_results(run)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        parser.exit(2, "\n".join(problems) + "\n")
    return runs


def _print(*tables: "RenderableType") -> None:
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 120)  # rich would cut numbers to a narrower terminal's width, or a pipe's, 80
    for table in tables:
        console.print(table)


def _draw(study: "Study", parser: argparse.ArgumentParser) -> None:
    """Draw the figure of a study; if it cannot be written, exit with a message."""
    from lit_recon.report.study_figure import write_study_figure

    try:
        write_study_figure(study)
    except OSError as error:
        expected = "expected runs in a folder you may write to"
        parser.exit(2, f"{study.figure}: the figure cannot be written ({error}); {expected}.\n")


if __name__ == "__main__":
    sys.exit(main())
