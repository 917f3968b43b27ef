"""The output folder of a run, from its first moment to its last."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.console import Console

from lit_recon.activations.disk_store import free_space, nearest
from lit_recon.report.page import write_report
from lit_recon.report.run_files import read_results
from lit_recon.system.atomic_files import remove, replaced
from lit_recon.system.command_line import Refusal
from lit_recon.system.commits import CommitError
from lit_recon.system.lock import hold
from lit_recon.system.units import in_gb

ACTIVATIONS = "activations"  # while a run that keeps hidden states on disk is in progress
NEXT_CONFIG = "config.next.yaml"  # of a run that is about to overwrite another
RUN_FILES = (
    *("results.json", "checkpoint", "masks.safetensors", "tensorboard", "report.html", "figures"),
    *("commits", "checkpoint.partial", "checkpoint.old", f"{NEXT_CONFIG}.partial"),
)
OF_A_START = ("config.yaml.partial", "lease.lock", "lease.json")  # left by a run that was killed as it began


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raise a ValueError where a run cannot be written to `folder`, or would destroy something there."""
    existing = nearest(folder)
    try:
        tempfile.TemporaryFile(dir=existing).close()  # permissions do not tell of a read-only or a special file system
    except OSError as error:
        raise ValueError(
            f"output_dir={folder}: cannot write to {existing} ({error.strerror}); choose another output_dir."
        ) from error
    if existing != folder.absolute() or {path.name for path in folder.iterdir()} <= {*OF_A_START}:
        return
    config = folder / "config.yaml"
    if not config.is_file() or "lit_recon." not in config.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"output_dir={folder} holds files that are not a run; choose an empty or a new folder.")
    if not overwrite:
        finished = (folder / "results.json").is_file()
        raise ValueError(
            f"output_dir={folder} holds {'a finished' if finished else 'an unfinished'} run; choose another, "
            + ("" if finished else f"resume it (resume={folder}), ")
            + "or replace it with overwrite=true."
        )


def announce_output(folder: Path, config: str) -> Path:
    """Write the configuration of a run that begins, next to that of a run that it will overwrite; its path."""
    own = folder / "config.yaml"
    path = folder / NEXT_CONFIG if own.exists() else own
    with replaced(path) as file:
        file.write(config.encode())
    return path


def begin_output(folder: Path, config: str) -> None:
    """Clear the folder for a run and write its configuration, whole or not at all, in place of an earlier one's."""
    clear_output(folder)
    with replaced(folder / "config.yaml") as file:
        file.write(config.encode())
    (folder / NEXT_CONFIG).unlink(missing_ok=True)


def undo_output(made: Sequence[Path]) -> None:
    """Remove folders that were made for a run, the inner ones first, as far as nothing is in them."""
    for path in made:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def left_behind(folder: Path) -> int:
    """Bytes of what `clear_output` will remove."""
    paths = [path for name in RUN_FILES for path in (folder / name, *(folder / name).rglob("*")) if path.is_file()]
    found = {(about.st_dev, about.st_ino): about.st_size for about in (path.stat() for path in paths)}
    return sum(found.values())  # a commit's file and its second name in checkpoint/ once


def check_disk(folder: Path, needed: int) -> None:
    """Raise a ValueError where the disk has no room for `needed` bytes more in a run's folder."""
    free = free_space(folder)
    if needed > free:
        raise ValueError(
            f"output_dir={folder}: the run needs {in_gb(needed)} there, where {in_gb(free)} are free; free "
            "some space, or choose an output_dir on another disk."
        )


def clear_output(folder: Path) -> None:
    """Remove what an earlier run left in the folder of this one, and only that; its configuration stays till the last.

    A run that is killed during that is still a run, which can be resumed.
    """
    for name in RUN_FILES:
        remove(folder / name)


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
        Refusal: The run is in progress, or its results cannot be read.
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
    said = f"{output} was finished but for its report, which is there now"
    console.print(said, highlight=False, soft_wrap=True, markup=False)
    return True


def draw_report(output: Path) -> None:
    """Remove the commits, from which nothing will be resumed any more, and draw the report."""
    left = f"{output} is finished but for its report, which resume={output} draws"
    try:
        with suppress(OSError):  # a file that another program has open; the report matters more
            remove(output / "commits")
        write_report(output)
    except KeyboardInterrupt as stop:
        raise type(stop)(left) from stop
    except OSError as error:
        raise CommitError(f"{error}; {left}") from error
