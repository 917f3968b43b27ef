"""The output folder of a run, from its first moment to its last."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from lit_recon.commits import CommitError
from lit_recon.lease import hold
from lit_recon.plots import read_results
from lit_recon.report import write_report
from lit_recon.startup import NEXT_CONFIG, Refusal, announce_output, undo_output


@contextmanager
def begun(output: Path, config: str, *, resumed: bool) -> Iterator[None]:
    """Hold the output folder, with the configuration in it; without a trace where the run is refused."""
    made = [path for path in (output, *output.parents) if not path.exists()]
    overwritten = output / NEXT_CONFIG
    try:
        with held(output):
            announced = overwritten.exists()  # by a process that was killed
            written = None if resumed else announce_output(output, config)
            try:
                yield
            except Refusal:
                if written and not announced:
                    written.unlink()
                raise
            except KeyboardInterrupt as stop:
                if overwritten.exists() and not announced:
                    overwritten.unlink()
                    raise type(stop)(f"{output} holds the earlier run as it was") from stop
                raise
    except Refusal:
        undo_output(made)
        raise


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Hold an output folder; a Refusal where another process has it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(output))
        except ValueError as error:
            raise Refusal(str(error)) from error
        yield


def finish(output: Path, console: Console) -> bool:
    """Do what is left of a run that was ended between its results and its report; False: it is no such run.

    Raises:
        Refusal: The run is in work, or its results cannot be read.
        CommitError: The disk is full or read-only.
        KeyboardInterrupt: Ctrl-C.
    """
    there = [(output / name).is_file() for name in ("config.yaml", "results.json", "report.html", NEXT_CONFIG)]
    if there != [True, True, False, False]:
        return False
    try:
        read_results(output)
    except ValueError as error:
        raise Refusal(f"resume={output}: {error}") from error
    with held(output):
        draw_report(output)
    console.print(f"{output} was finished but for its report, which is there now", highlight=False, soft_wrap=True)
    return True


def draw_report(output: Path) -> None:
    """Remove the commits, of which none will be taken up any more, and draw the report."""
    left = f"{output} is finished but for its report, which resume={output} draws"
    try:
        shutil.rmtree(output / "commits", ignore_errors=True)
        write_report(output)
    except KeyboardInterrupt as stop:
        raise type(stop)(left) from stop
    except OSError as error:
        raise CommitError(f"{error}; {left}") from error
