"""The command that draws the reports of runs again and compares runs in a table.

    python -m lit_recon.report RUN [RUN ...] [--out FOLDER] [--group KEY[,KEY]] [--markdown]

Figures and page of each run come from the files that it left; nothing is computed again and no model is loaded. Of
several runs there is one page more, over all of them (overview.py), with its figures and tables in a folder next to
them. Checkpoints of other tools that `python -m lit_recon.evaluate` has measured have a page and a row as well. Runs
that are not finished are listed as such. Runs that differ in nothing but the criterion are a study (study.py): their
spread is printed below the table, and a figure is drawn next to them.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_recon.report.groups import resolve
from lit_recon.report.runs import EVALUATED, NONE, Run, read_runs
from lit_recon.system.terminal import Parser, readable_output, say

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
    if not any(run.results or run.state == EVALUATED for run in runs):
        return 2 if said else 0
    try:
        keys = [resolve(key, runs) for keys in chosen.group for key in keys.split(",")]
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    listed, out = [run for run in runs if run.state != NONE], chosen.out
    is_one = len(listed) == 1
    problems = _draw_pages(runs, out if is_one else None)
    problems += _show(runs, in_markdown=chosen.markdown)
    problems += [] if is_one else _draw_overview(runs, out, keys, quiet=chosen.markdown)
    if is_one and not problems and not chosen.markdown:
        say(f"Report: {(out / 'report.html' if out else listed[0].page).as_posix()}\n")
    _say(problems)
    return 2 if problems or not all(run.is_expected for run in runs) else 0


def _parser() -> ArgumentParser:
    about = "Redraw the figures and report.html of finished runs and print one table that compares all."
    parser = Parser(prog="python -m lit_recon.report", description=about)
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="folder of a run, such as runs/granularity/*; or a checkpoint that was evaluated, by its folder or record",
    )
    where = "where the page goes; by default into the folder of a run, of several into report/ next to them"
    parser.add_argument("--out", metavar="FOLDER", type=Path, help=where)
    keys = "keys of config.yaml to group runs by, such as module.optimizer.lr,data.num_samples; by default those"
    more = f"{keys} in which runs differ, seed apart"
    parser.add_argument("--group", metavar="KEYS", action="append", default=[], help=more)
    parser.add_argument("--markdown", action="store_true", help="print in Markdown, for a README or a paper")
    return parser


def _say(messages: Sequence[str]) -> bool:
    """Print messages on stderr, one a line; False: there was none."""
    lines = [message for message in messages if message]
    say("".join(f"{line}\n" for line in lines), error=True)
    return bool(lines)


def _draw_pages(runs: Sequence[Run], out: Path | None) -> list[str]:
    """Draw figures and page of each finished run, and of each checkpoint that was evaluated.

    An only one goes into `out`; pages of several that are current stay.

    Returns:
        What went wrong.
    """
    # Here and not at the top: matplotlib, jinja2 and rich take a second, which --help and messages do not need.
    from lit_recon.report.checkpoint_page import write_checkpoint_report
    from lit_recon.report.page import is_current, write_report

    problems = []
    for run in runs:
        try:
            if len(runs) > 1 and is_current(run.page, run.shown):
                continue
            if run.results is not None:
                write_report(run.folder, out or run.folder)
            elif run.state == EVALUATED:
                write_checkpoint_report(run.folder, out or run.page.parent)
        except (OSError, ValueError) as error:
            expected = "expected a folder you may write to"
            problems.append(f"{run.folder}: the report cannot be written ({error}); {expected}.")
    return problems


def _draw_overview(runs: Sequence[Run], out: Path | None, keys: Sequence[str], *, quiet: bool) -> list[str]:
    """Draw the page over all runs and say where it is; what went wrong."""
    from lit_recon.report.overview import write_overview

    try:
        page = write_overview(runs, out, keys)
    except ValueError as error:
        return [str(error)]
    except OSError as error:
        return [f"{out or 'report'}: the report over all cannot be written ({error}); give another folder by --out."]
    if not quiet:
        say(f"Report: {page.as_posix()}\n")
    return []


def _show(runs: Sequence[Run], *, in_markdown: bool) -> list[str]:
    """Print the table of all runs, and spread and figure of each study; what went wrong."""
    from lit_recon.report.comparison import as_markdown, by_short_name, comparison
    from lit_recon.report.study import spread_markdown, spread_table, studies
    from lit_recon.report.study_figure import write_study_figure

    finished = {run.folder: run.results for run in runs if run.results is not None}
    listed = {run.folder: run.results or _known(run) for run in runs if run.state != NONE}
    named, found, problems = by_short_name(listed), studies(finished), []
    if in_markdown:
        say("\n".join([as_markdown(named), *map(spread_markdown, found)]))
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
        say(f"\n![nats of each criterion](<{path}>)\n" if in_markdown else f"Figure: {path}\n")
    return problems


def _known(run: Run) -> list[str]:
    """State of a run without results, and the perplexities of a checkpoint that was only evaluated."""
    from lit_recon.report.measures import DENSE, GAP, PERPLEXITY, PRUNED

    return [run.state, *(one.text_of(run) for one in (DENSE, PRUNED, PERPLEXITY, GAP))]


def _print(*tables: "RenderableType") -> None:
    from lit_recon.system.console import Console

    console = Console()
    console.width = max(console.width, 120)  # rich would cut numbers to a narrower terminal's width, or a pipe's, 80
    for table in tables:
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
