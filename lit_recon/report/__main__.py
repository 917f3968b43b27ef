"""The command that draws the reports of runs again and compares runs in a table.

    python -m lit_recon.report RUN [RUN ...] [--markdown]

Figures and page of each run come from the files that it left; nothing is computed again and no model is loaded. Runs
that are not finished are listed as such. Runs that differ in nothing but the criterion are a study (study.py): their
spread is printed below the table, and a figure is drawn beside them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_recon.report.runs import NONE, Run, read_runs
from lit_recon.system.terminal import readable_output

if TYPE_CHECKING:
    from rich.console import RenderableType


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of each finished run on the command line, then print the table of all.

    Args:
        arguments: The command line without the program's name; None takes that of the process.

    Returns:
        The exit status: 2 where a folder is no run, holds one that has not finished and is not in progress, or holds
        files that cannot be read, and where something cannot be written, each with a message on stderr; else 0. What
        can be shown is shown.

    Raises:
        SystemExit: With status 0 after `--help`, with status 2 for a command line that is none.
    """
    parser = _parser()
    chosen = parser.parse_args(arguments)
    readable_output()
    runs = read_runs(chosen.runs)
    said = _say([*(run.message for run in runs), *(remark for run in runs for remark in run.remarks)])
    if not any(run.results for run in runs):
        return 2 if said else 0
    problems = [*_draw_pages(runs), *_show(runs, in_markdown=chosen.markdown)]
    _say(problems)
    return 2 if problems or not all(run.is_expected for run in runs) else 0


def _parser() -> argparse.ArgumentParser:
    about = "Redraw the figures and report.html of finished runs and print one table that compares all."
    parser = argparse.ArgumentParser(prog="python -m lit_recon.report", description=about)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, such as runs/granularity/*")
    parser.add_argument("--markdown", action="store_true", help="print in Markdown, for a README or a paper")
    return parser


def _say(messages: Sequence[str]) -> bool:
    """Print messages on stderr, one a line; False: there was none."""
    lines = [message for message in messages if message]
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    return bool(lines)


def _draw_pages(runs: Sequence[Run]) -> list[str]:
    """Draw figures and page of each finished run; what went wrong."""
    # Here and not at the top: matplotlib, jinja2 and rich take a second, which --help and messages do not need.
    from lit_recon.report.page import write_report

    problems = []
    for run in runs:
        try:
            if run.results is not None:
                write_report(run.folder)
        except OSError as error:
            expected = "expected a folder you may write to"
            problems.append(f"{run.folder}: the report cannot be written ({error}); {expected}.")
    return problems


def _show(runs: Sequence[Run], *, in_markdown: bool) -> list[str]:
    """Print the table of all runs, and spread and figure of each study; what went wrong."""
    from lit_recon.report.comparison import as_markdown, by_short_name, comparison
    from lit_recon.report.study import spread_markdown, spread_table, studies
    from lit_recon.report.study_figure import write_study_figure

    finished = {run.folder: run.results for run in runs if run.results is not None}
    listed = {run.folder: run.results or run.state for run in runs if run.state != NONE}
    named, found, problems = by_short_name(listed), studies(finished), []
    if in_markdown:
        sys.stdout.write("\n".join([as_markdown(named), *map(spread_markdown, found)]))
    else:
        _print(comparison(named), *map(spread_table, found))
    for study in found:
        path = study.figure.as_posix()
        try:
            write_study_figure(study)
        except OSError as error:
            expected = "expected runs in a folder you may write to"
            problems.append(f"{path}: the figure cannot be written ({error}); {expected}.")
            continue
        sys.stdout.write(f"\n![nats of each criterion](<{path}>)\n" if in_markdown else f"Figure: {path}\n")
    return problems


def _print(*tables: "RenderableType") -> None:
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 120)  # rich would cut numbers to a narrower terminal's width, or a pipe's, 80
    for table in tables:
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
