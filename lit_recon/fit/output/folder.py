"""The output folder of a run, from its first moment to its last."""

import hashlib
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from lit_recon.activations.disk_store import free_space, nearest
from lit_recon.fit.job import Output
from lit_recon.report.page import write_report
from lit_recon.report.run_files import read_results
from lit_recon.system.atomic_files import remove, replaced
from lit_recon.system.command_line import Refusal, as_argument
from lit_recon.system.commits import MARK, CommitError
from lit_recon.system.console import Console
from lit_recon.system.lock import hold
from lit_recon.system.units import in_gb

ACTIVATIONS = "activations"  # while a run that keeps hidden states on disk is in progress
NEXT_CONFIG = "config.next.yaml"  # of a run that has begun to clear the folder
RUN_FILES = (
    *("results.json", "checkpoint", "masks.safetensors", "tensorboard", "report.html", "figures"),
    "evaluations.json",  # of the checkpoint
    *("commits", MARK, f"{MARK}.partial", "checkpoint.partial", "checkpoint.old", f"{NEXT_CONFIG}.partial"),
)
OF_A_START = ("config.yaml.partial", "lease.lock", "lease.json")  # left by a run that was killed as it began


def check_writable(folder: Path) -> None:
    """Raise a ValueError where nothing can be written to `folder`."""
    if any("\ud800" <= letter <= "\udfff" for letter in str(folder)):  # bytes that are no letters
        raise ValueError(
            f"output_dir={folder}: the name is not UTF-8, which libraries that write there need; choose another."
        )
    existing = nearest(folder)
    try:
        tempfile.TemporaryFile(dir=existing).close()  # permissions do not tell of a read-only or a special file system
    except OSError as error:
        raise ValueError(
            f"output_dir={folder}: cannot write to {existing} ({error.strerror}); choose another output_dir."
        ) from error


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raise a ValueError where a run cannot be written to `folder`, or would destroy something there."""
    check_writable(folder)
    if not folder.is_dir() or {path.name for path in folder.iterdir()} <= {*OF_A_START}:
        return
    config = folder / "config.yaml"
    if not config.is_file() or "lit_recon." not in config.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"output_dir={folder} holds files that are not a run; choose an empty or a new folder.")
    if not overwrite:
        finished = (folder / "results.json").is_file()
        raise ValueError(
            f"output_dir={folder} holds {'a finished' if finished else 'an unfinished'} run; choose another, "
            + ("" if finished else f"resume it ({as_argument('resume', folder)}), ")
            + "or replace it with overwrite=true."
        )


def begin_output(folder: Path, config: str) -> None:
    """Clear the folder for a run and write its configuration, whole or not at all, in place of an earlier one's.

    From the first change on it is the new run that resume begins: nothing of the old one counts any more.
    """
    _write(folder / NEXT_CONFIG, config)
    clear_output(folder)
    _write(folder / "config.yaml", config)
    (folder / NEXT_CONFIG).unlink()


def _write(path: Path, config: str) -> None:
    with replaced(path) as file:
        file.write(config.encode())


def folder_state(folder: Path) -> str:
    """What decides what may be done with a folder: its configuration, and whether it holds results."""
    digest = hashlib.sha256()
    for name in ("config.yaml", NEXT_CONFIG):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"none")
    return f"{digest.hexdigest()} {(folder / 'results.json').is_file()}"


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


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a run with results, that no other has begun to clear."""
    return [(folder / name).is_file() for name in ("config.yaml", "results.json", NEXT_CONFIG)] == [True, True, False]


@contextmanager
def made(output: Output) -> Iterator[Output]:
    """Make the output folder; where the run is refused, nothing of it stays.

    Yields:
        The output. A folder that is named after the time gets a number where another run has that name already.

    Raises:
        Refusal: The folder cannot be made.
    """
    before = {path for path in (output.folder, *output.folder.parents) if path.exists()}
    try:
        output = _claimed(output) if output.named_by_time and not output.resume else output
        output.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"output_dir={output.folder} cannot be made ({error.strerror}); choose another.") from error
    try:
        yield output
    except Refusal:
        for path in (output.folder, *output.folder.parents):
            if path not in before and path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


def _claimed(output: Output) -> Output:
    """The output with a folder that no other process has made."""
    for number in itertools.count(1):
        folder = output.folder.with_name(output.folder.name + (f"-{number}" if number > 1 else ""))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return replace(output, folder=folder, config=output.config | {"output_dir": str(folder)})
    raise AssertionError("unreachable")


@contextmanager
def begun(output: Output, config: str) -> Iterator[None]:
    """Hold the output folder, with the configuration of a run in it.

    What was found out about the folder before it was held is compared with what it is now: another process may have
    begun or finished a run in it. An earlier run stays as it is until `begin_output`.

    Raises:
        Refusal: Another process holds the folder, or has changed what is in it.
    """
    folder, own = output.folder, output.folder / "config.yaml"
    try:
        with held(folder):
            if not output.named_by_time and folder_state(folder) != output.found:
                setting = "resume" if output.resume else "output_dir"
                holds = "a finished run" if (folder / "results.json").is_file() else "another run"
                raise Refusal(
                    f"{as_argument(setting, folder)} holds {holds} since this command began: another process has "
                    "worked there. Nothing was changed; look at what is there now, and start again."
                )
            new = not own.exists()
            if new:
                _write(own, config)
            try:
                yield
            except Refusal:
                if new:
                    own.unlink()
                raise
    except KeyboardInterrupt as stop:
        if not output.resume and own.is_file() and folder_state(folder) == output.found:
            raise type(stop)(f"{folder} holds the earlier run as it was") from stop
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
    if not _lacks_report(output):
        return False
    try:
        read_results(output)
    except ValueError as error:
        raise Refusal(f"resume={output}: {error}") from error
    with held(output):
        if not _lacks_report(output):  # another process has drawn it, or begun another run
            return False
        draw_report(output)
    said = f"{output} was finished but for its report, which is there now"
    console.print(said, highlight=False, soft_wrap=True, markup=False)
    return True


def _lacks_report(output: Path) -> bool:
    return is_finished(output) and not (output / "report.html").is_file()


def draw_report(output: Path) -> None:
    """Remove the commits, from which nothing will be resumed any more, and draw the report."""
    left = f"{output} is finished but for its report, which {as_argument('resume', output)} draws"
    try:
        with suppress(OSError):  # a file that another program has open; the report matters more
            remove(output / "commits")
            remove(output / MARK)
        write_report(output)
    except KeyboardInterrupt as stop:
        raise type(stop)(left) from stop
    except OSError as error:
        raise CommitError(f"{error}; {left}") from error
