"""Words of command lines that are wrong, or nearly right; and how a command has to end on whatever it is given."""

import re
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGTERM

import psutil
import pytest
from launcher import Ended, Launcher
from omegaconf import DictConfig, OmegaConf

NUMBERS = "0 1 -1 2 0.5 -0.5 1e30 1e-30 nan inf -inf 9999999999999999999999 007 1_0 3 8 0.1 2024 5e10123 1:30 1e400"
WORDS = "true false null abc 'abc' '' ??? half block sparse local mix documents row matrix disk bfloat16 cpu 16-mixed"
PATHS = "~/x ~nobody/x /home/zoë/x été 日本 /proc/x /dev/null /dev/null/x nowhere . .. / a/../b - -- % @x $HOME \\ a\\"
LISTS = "[] [1] [1,2] [abc] [a=b] [null] [[1]] {} {a:1} {a:{b:[1]}} [{a:1}] [ {a ] run[1] a=b a,b 1,2 a(b b) it's \" '"
GRAMMAR = "range(3) choice(1,2) glob(*) int(3) sort(2,1) a#b a;b ${seed} ${nope} ${oc.env:NOPE} ${hydra:job.num} ${"
TARGETS = "builtins.dict torch.load os.getcwd lit_recon lit_recon.modules.losses.mean_squared no.where.Class 1GiB -5GB"
OBJECTS = "{_target_:builtins.dict} {_target_:no.Where} {_target_:torch.nn.Linear} [{_target_:builtins.list}]"
VALUES = " ".join((NUMBERS, WORDS, PATHS, LISTS, GRAMMAR, TARGETS, OBJECTS)).split()
VALUES += ["", "a b", '"a b"', "6 apples", "a\tb", "a\nb", "a\x1b[31mb", "x" * 5000]
NONSENSE = ("nope=1", "data.nope=1", "nope", "=1", "é=1", "a b=1", "-x", "--nope", "[", "~", "+")
LONGEST = 30.0  # seconds of work after which a command that goes on is stopped; others' work does not count


def leaves(node: DictConfig, name: str = "") -> Iterator[str]:
    """The settings of a configuration."""
    for key in node:
        below = f"{name}.{key}" if name else str(key)
        yield below
        child = node._get_node(key)
        if isinstance(child, DictConfig) and OmegaConf.is_dict(child) and not child._is_none():
            yield from leaves(child, below)


def name_of(word: str) -> str:
    """The setting of a word of a command line."""
    return word.partition("=")[0].lstrip("+~")


def ended_in_time(
    launcher: Launcher, *words: str, command: str = "fit", longest: float = LONGEST
) -> tuple[Ended, bool]:
    """How a command ended, and whether it had to be stopped."""
    running, ended, stopped = launcher.start(*words, command=command), threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.wait(1) and not stopped.is_set():
            with suppress(psutil.NoSuchProcess):
                if sum(psutil.Process(running.pid).cpu_times()[:2]) > longest:
                    stopped.set()
                    running.send(SIGTERM)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        return running.wait(), stopped.is_set()
    finally:
        ended.set()
        watching.join()


def ended_here(main: Callable[[list[str]], int], line: list[str], capfd: pytest.CaptureFixture[str]) -> Ended:
    """How a command ended that runs in this process; 1 and a traceback where it raises."""
    capfd.readouterr()
    try:
        status, raised = main(line), ""
    except SystemExit as end:
        status, raised = int(end.code or 0), ""
    except Exception:
        status, raised = 1, traceback.format_exc()
    out, err = capfd.readouterr()
    return Ended(status, out, err + raised)


def problem(line: Sequence[str], ended: Ended, left: Sequence[str], allowed: Sequence[int] = (0, 2)) -> str | None:
    """What is wrong with how a command line ended.

    Args:
        line: Its words.
        ended: How it ended.
        left: What it has left behind, and should not have.
        allowed: Exit statuses.
    """
    said = ended.err + ended.out
    if ended.status not in allowed:
        return f"status {ended.status}"
    if "Traceback" in said or "Error executing job" in said:
        return "a traceback"
    if "\x1b" in said:
        return "an escape code"
    if left:
        return f"left {left}"
    names = {re.split(r"[=@]", word)[0].lstrip("+~") for word in line} | {word.strip() for word in line}
    names |= {
        part for name in names for part in (name.rpartition(".")[0], name.partition(".")[0], name.rpartition(".")[2])
    } - {""}
    if ended.status == 2 and not any(name in ended.err for name in names if name not in ("", "plan")):
        return "no setting is named"
    return None


def files(folder: Path) -> set[str]:
    """Names of all that is below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
