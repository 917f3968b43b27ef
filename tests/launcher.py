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
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LAZY = (
    "lit_recon.pruning.criteria.wanda",
    "lit_recon.pruning.criteria.magnitude",
    "lit_recon.data.files",
    "lit_recon.modules.masked_weights",
    "lit_recon.modules.schedules",
    "torch.utils.tensorboard",
)
STEPS = (
    "fsync",
    "replace",
    "link",
    "crc32",
)  # of lit_recon.system.atomic_files; crc32 follows each chunk that is written
# What Python tells of before it does it, also in what other libraries do.
EVENTS = ("open", "os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "os.utime")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Ended(NamedTuple):
    """How a command ended; a negative status is the signal that killed it."""

    status: int
    out: str
    err: str
    steps: int = 0  # by which the disk changed, where they were counted


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
        out, err, steps = (self.folder / f"{self.pid}.{name}" for name in ("out", "err", "steps"))
        return Ended(status, out.read_text(), err.read_text(), int(steps.read_text()) if steps.exists() else 0)


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
        self.ask({"wait": None})  # until all is imported

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *arguments: str, **faults: Any) -> Running:
        """Start `python -m lit_recon.fit` in the working directory.

        Args:
            *arguments: Of the command line.
            **faults: `die_at`: the step by which the disk changes before which it is killed; they are counted then.
                `fail_at`: the one from which on each fails. `failure`: name of the error with which it fails. `kinds`:
                which steps count, of STEPS and EVENTS. `snapshots`: a folder for copies of the output folder as it is
                before each `every`-th step, beside what was said so far: what SIGKILL would leave there. `drawn`:
                whether the report is drawn. `command`: another of the package than "fit".
        """
        request = {"die_at": None, "fail_at": None, "failure": "ENOSPC", "kinds": STEPS, "snapshots": None, "every": 1}
        request |= {"drawn": False, "command": "fit"} | faults
        request |= {"arguments": arguments, "cwd": os.getcwd(), "folder": str(self.folder)}
        return Running(self, self.ask(request)["pid"], self.folder)

    def run(self, *arguments: str, **faults: Any) -> Ended:
        """The same to its end."""
        return self.start(*arguments, **faults).wait()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=30)


class _Steps:
    """The steps by which a run changes the disk.

    Args:
        request: That of the run.
        said: The path of what it says, without its ending.
    """

    def __init__(self, request: Mapping[str, Any], said: str) -> None:
        self.kinds = request["kinds"]
        self.die_at, self.fail_at, self.failure = (
            request["die_at"],
            request["fail_at"],
            getattr(errno, request["failure"]),
        )
        self.snapshots, self.every, self.said = request["snapshots"], request["every"], said
        given = dict(argument.partition("=")[::2] for argument in request["arguments"])
        self.run = os.path.abspath(given.get("resume") or given.get("output_dir") or ".")
        self.count = 0
        self._lock = threading.RLock()  # TensorBoard writes in a thread of its own
        self._copying = False

    def step(self) -> None:
        """Before each step."""
        with self._lock:
            if self._copying:
                return
            self.count += 1
            if self.snapshots and self.count % self.every == 0 and os.path.isdir(self.run):
                self._copying = True
                snapshot = Path(self.snapshots, f"{self.count:04}")
                copied(Path(self.run), snapshot / "run")
                shutil.copyfile(f"{self.said}.out", snapshot / "out")
                self._copying = False
        if self.count == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fail_at is not None and self.count >= self.fail_at:
            raise OSError(self.failure, os.strerror(self.failure))

    def install(self) -> None:
        """Be called from now on."""
        from lit_recon.system import atomic_files, tensor_files

        if set(self.kinds) & set(EVENTS):
            sys.addaudithook(self._told)
        for module in ("os", "zlib"):
            content = vars(sys.modules[module])
            patched = {name: self._before(content[name]) for name in self.kinds if name in content}
            for user in (atomic_files, tensor_files):
                if hasattr(user, module):
                    setattr(user, module, types.SimpleNamespace(**content | patched))
        atomic_files.CHUNK = tensor_files.CHUNK = 1 << 12  # several chunks in a file of the tiny model

    def _told(self, event: str, arguments: Sequence[Any]) -> None:
        """Before each operation that Python tells of."""
        if event not in self.kinds or (event == "open" and not arguments[2] & WRITING):
            return
        path = arguments[1] if event in ("os.link", "os.symlink") else arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)):
            inside = os.path.abspath(os.fsdecode(path)).startswith(self.run)
            if inside or (event in ("os.remove", "os.rmdir") and arguments[1] != -1):  # in a folder that is removed
                self.step()

    def _before(self, function: Callable) -> Callable:
        def patched(*arguments: Any, **settings: Any) -> Any:
            self.step()
            return function(*arguments, **settings)

        return patched


def copied(folder: Path, target: Path) -> Path:
    """A copy of a folder, in which what is one file under two names is so too."""
    names: dict[int, Path] = {}
    target.mkdir(parents=True)
    for path in sorted(folder.rglob("*")):
        copy = target / path.relative_to(folder)
        if path.is_dir():
            copy.mkdir()
        elif (inode := path.stat().st_ino) in names:
            os.link(names[inode], copy)
        else:
            names[inode] = copy
            shutil.copy(path, copy)
    return target


def run_to_the_end(main: Callable[[], None], last: Callable[[], object] = lambda: None) -> None:
    """The command in a forked process, which ends with its status, after what is to be done last."""
    status = 1
    try:
        main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        last()
        os._exit(status)


def compose_once() -> None:
    """Let Hydra compose each configuration once.

    It composes a first time for nothing but `hydra.mode`, which experiments alone set: a tenth of a tiny run.
    """
    from hydra._internal.hydra import Hydra

    whole = Hydra.get_mode

    def get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        told = any("experiment" in override or "hydra" in override for override in overrides)
        return whole(self, config_name, overrides) if told else None

    Hydra.get_mode = get_mode  # type: ignore


def _child(request: Mapping[str, Any]) -> None:
    """The forked process."""
    from lit_recon.fit.output import folder as output

    command = importlib.import_module(f"lit_recon.{request['command']}.__main__")
    said = f"{request['folder']}/{os.getpid()}"
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ["LIT_RECON_CACHE"] = f"{request['folder']}/cache"
    os.chdir(request["cwd"])
    sys.path.insert(0, request["cwd"])  # as `python -m` does
    sys.argv = [request["command"], *request["arguments"]]
    if not request["drawn"]:
        output.write_report = lambda folder: None  # half of the time of a tiny run, after all that matters here
    steps = _Steps(request, said)
    if request["die_at"] or request["fail_at"] or request["snapshots"]:
        steps.install()
    run_to_the_end(command.main, lambda: Path(f"{said}.steps").write_text(str(steps.count)))


def _import_everything() -> None:
    """What runs import on their way, and what they would make at their first call."""
    from transformers import AutoModelForCausalLM

    from lit_recon.fit import __main__ as fit
    from lit_recon.model.architectures import tiny_model

    kinds = [f"transformers.models.{kind}.modeling_{kind}" for kind in ("llama", "gpt2", "phi", "mixtral")]
    for name in (*LAZY, *kinds):
        importlib.import_module(name)
    compose_once()
    sys.argv = ["fit", "--cfg", "job"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        fit.main()
        with tempfile.TemporaryDirectory() as folder:  # the first model that is read compiles a thousand expressions
            tiny_model("llama").save_pretrained(folder)
            AutoModelForCausalLM.from_pretrained(folder)
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None  # by which a walk ends


def main() -> None:
    """Answer requests until the input ends."""
    _import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request and request["wait"] is None:
            answer = {"status": 0}
        elif "wait" in request:
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
