"""The command that draws reports again and compares runs.

    python -m lit_recon.report [--markdown] RUN [RUN ...]

redraws the figures and the page of each run from what it left behind and prints the table; nothing is computed again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lit_recon.report.comparison import as_markdown, comparison, named
from lit_recon.report.page import write_report
from lit_recon.report.run_files import read_results


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


if __name__ == "__main__":
    sys.exit(main())
