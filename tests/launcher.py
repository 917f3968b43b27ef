"""The command line in processes that start within milliseconds: one process imports everything and forks for each run.

`Launcher` starts that process and talks with it in lines of JSON; a test can kill a run, or have it die or fail at the
n-th step by which the disk changes.
"""

import contextlib
import errno
import gc
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

LAZY = (
    "lit_recon.criteria.wanda",
    "lit_recon.criteria.magnitude",
    "lit_recon.data.files",
    "lit_recon.modules.reconstruction",
    "lit_recon.modules.schedules",
    "torch.utils.tensorboard",
)
STEPS = ("fsync", "replace", "link", "crc32")  # of lit_recon.durable; crc32 follows each chunk that is written


class Ended(NamedTuple):
    """How a command ended; a negative status is the signal that killed it."""

    status: int
    out: str
    err: str


class Running:
    """A run in work.

    Args:
        launcher: Its launcher.
        pid: Its process.
        folder: Where it writes what it says.
    """

    def __init__(self, launcher: "Launcher", pid: int, folder: Path) -> None:
        self.launcher, self.pid, self.folder = launcher, pid, folder

    def send(self, number: int) -> None:
        """Send it a signal; it may have ended, but not been waited for."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Its end."""
        status = self.launcher.ask({"wait": self.pid})["status"]
        return Ended(status, *((self.folder / f"{self.pid}.{name}").read_text() for name in ("out", "err")))


class Launcher:
    """Starts runs.

    Args:
        folder: Where they write what they say.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        root = str(Path(__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self, *arguments: str, die_at: int | None = None, fail_at: int | None = None, failure: str = "ENOSPC"
    ) -> Running:
        """Start `python -m lit_recon.fit` in the working directory.

        Args:
            *arguments: Of the command line.
            die_at: The step by which the disk changes before which it is killed.
            fail_at: The one from which on each fails.
            failure: Name of the error with which it fails.
        """
        request = {"arguments": arguments, "cwd": os.getcwd(), "die_at": die_at, "fail_at": fail_at, "failure": failure}
        pid = self.ask(request | {"folder": str(self.folder)})["pid"]
        return Running(self, pid, self.folder)

    def run(self, *arguments: str, **faults: Any) -> Ended:
        """The same to its end."""
        return self.start(*arguments, **faults).wait()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=30)


def _counted(die_at: int | None, fail_at: int | None, failure: str) -> Callable[[], None]:
    """Called before each step by which the disk changes."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if fail_at is not None and count >= fail_at:
            number = getattr(errno, failure)
            raise OSError(number, os.strerror(number))

    return step


def _patch(step: Callable[[], None]) -> None:
    from lit_recon import durable

    def before(function: Callable) -> Callable:
        def patched(*arguments: Any, **settings: Any) -> Any:
            step()
            return function(*arguments, **settings)

        return patched

    for module in ("os", "zlib"):
        content = vars(sys.modules[module])
        patched = {name: before(content[name]) for name in STEPS if name in content}
        setattr(durable, module, types.SimpleNamespace(**content | patched))
    durable.CHUNK = 1 << 12  # several chunks in a file of the tiny model


def _child(request: Mapping[str, Any]) -> None:
    """The forked process."""
    from lit_recon import fit

    for name, descriptor in (("out", 1), ("err", 2)):
        file = os.open(f"{request['folder']}/{os.getpid()}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    os.environ["LIT_RECON_CACHE"] = f"{request['folder']}/cache"
    os.chdir(request["cwd"])
    sys.path.insert(0, request["cwd"])
    sys.argv = ["fit", *request["arguments"]]
    if request["die_at"] or request["fail_at"]:
        _patch(_counted(request["die_at"], request["fail_at"], request["failure"]))
    status = 1
    try:
        fit.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _import_everything() -> None:
    """What runs import on their way, and what they would make at their first call."""
    from lit_recon import fit, run

    kinds = [f"transformers.models.{kind}.modeling_{kind}" for kind in ("llama", "gpt2", "phi", "mixtral")]
    for name in (*LAZY, *kinds):
        importlib.import_module(name)
    sys.argv = ["fit", "--cfg", "job"]
    with contextlib.redirect_stdout(io.StringIO()):
        fit.main()
    run.write_report = lambda folder: None  # half of the time of a tiny run, after all that matters here
    gc.collect()
    gc.freeze()


def main() -> None:
    """Answer requests until the input ends."""
    _import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"status": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        else:
            pid = os.fork()
            if pid == 0:
                _child(request)
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
