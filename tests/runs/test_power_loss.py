"""The power fails: what was not synced to the disk is lost, and what is left is a run that can be resumed.

A run is killed before one of its steps, then its folder is made what a disk may hold that has seen nothing but what was
synced: content of files without their names, or names without the content. A kill alone loses neither.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import content, numbers, tiny_settings
from launcher import run_to_the_end

from lit_recon.fit import __main__ as fit
from lit_recon.system import atomic_files

NEVER = 10**9

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not tell what is open")


class Disk:
    """What is on the disk for sure: the content of files that were synced, and the names in folders that were.

    Args:
        memory: Where that is kept, with a second name for each file, so that its number is not given to another.
        dies_at: The step before which the process is killed.
    """

    def __init__(self, memory: Path, dies_at: int) -> None:
        self.memory, self.dies_at, self.steps = memory, dies_at, 0
        for kind in ("content", "files", "names"):
            (memory / kind).mkdir(parents=True)

    def install(self) -> None:
        """Hear of each step from now on."""
        steps = {name: self._before(getattr(os, name)) for name in ("replace", "link")}
        atomic_files.os = SimpleNamespace(**vars(os) | steps | {"fsync": self._before(self.sync)})  # type: ignore

    def _before(self, function: Callable) -> Callable:
        def step(*arguments: Any) -> Any:
            self.steps += 1
            (self.memory / "steps").write_text(str(self.steps))
            if self.steps == self.dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return step

    def sync(self, descriptor: int) -> None:
        """Remember what is open."""
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        number = path.stat().st_ino
        if path.is_dir():
            names = {each.name: (each.stat().st_ino, each.is_dir()) for each in path.iterdir()}
            for name, (_, is_folder) in names.items():
                if not is_folder:
                    self._keep(path / name)
            (self.memory / "names" / str(number)).write_text(json.dumps(names))
        else:
            self._keep(path)
            shutil.copyfile(path, self.memory / "content" / str(number))

    def _keep(self, path: Path) -> None:
        kept = self.memory / "files" / str(path.stat().st_ino)
        if not kept.exists():
            os.link(path, kept)


def lose_content(run: Path, memory: Path) -> None:
    """Leave of each file what was synced of it."""
    for path in run.rglob("*"):
        if path.is_file():
            synced = memory / "content" / str(path.stat().st_ino)
            path.write_bytes(synced.read_bytes() if synced.exists() else b"")


def lose_names(folder: Path, memory: Path) -> None:
    """Leave the names that were synced, those of files that were removed since then too."""
    listing = memory / "names" / str(folder.stat().st_ino)
    names = json.loads(listing.read_text()) if listing.exists() else {}
    for path in list(folder.iterdir()):
        if names.get(path.name, (None, None))[0] != path.stat().st_ino:
            atomic_files.remove(path)
    for name, (number, is_folder) in names.items():
        path = folder / name
        if is_folder and path.is_dir():
            lose_names(path, memory)
        elif not is_folder and not path.exists():
            os.link(memory / "files" / str(number), path)


@pytest.fixture
def go(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, Path]]:
    """Start or resume a run in a process of its own, on a disk that forgets; its status, and what is on the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_recon.fit.output.folder.write_report", lambda folder: None)
    calls: list[Path] = []

    def go(run: str, *overrides: str, dies_at: int = NEVER) -> tuple[int, Path]:
        calls.append(tmp_path / "memory" / str(len(calls)))
        begun = (Path(run) / "config.yaml").is_file()
        settings = [*tiny_settings(model_folder, text_file), *overrides, f"output_dir={run}"]
        pid = os.fork()
        if not pid:
            _child([f"resume={run}"] if begun else settings, Disk(calls[-1], dies_at), tmp_path / "said")
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), calls[-1]

    return go


def _child(arguments: list[str], disk: Disk, said: Path) -> None:
    """The forked process."""
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["fit", *arguments]
    disk.install()
    run_to_the_end(fit.main)


def found(run: Path) -> dict[str, object]:
    """What a run is for: checkpoint, masks, numbers."""
    masks = (run / "masks.safetensors").read_bytes()
    return {"checkpoint": content(run / "checkpoint"), "masks": masks, "numbers": numbers(run)}


@pytest.mark.parametrize("kind", ["streamed", pytest.param("in memory", marks=pytest.mark.slow)])
@pytest.mark.parametrize("places", ["few", pytest.param("many", marks=pytest.mark.slow)])
def test_a_run_whose_power_failed_is_resumed_or_begun_again_with_the_same_bytes(
    go: Callable[..., tuple[int, Path]], unmappable_folder: Path, kind: str, places: str
) -> None:
    overrides = () if kind == "streamed" else (f"model.name={unmappable_folder}",)
    status, memory = go("whole", *overrides)
    assert status == 0, Path("said").read_text()
    whole, steps = found(Path("whole")), int((memory / "steps").read_text())
    assert steps > 50
    few = [(2 * steps // 3, lose_content), (5 * steps // 6, lose_names)]
    many = [(step, lose) for step in range(1, steps + 1, 5) for lose in (lose_content, lose_names)]
    resumed = 0
    for step, lose in few if places == "few" else many:
        run = Path(f"{lose.__name__}{step}")
        status, memory = go(str(run), *overrides, dies_at=step)
        assert status == -signal.SIGKILL, Path("said").read_text()
        lose(run, memory)
        resumed += bool(list((run / "commits").glob("*.json")))
        status, _ = go(str(run), *overrides)
        assert status == 0, (step, lose.__name__, Path("said").read_text())
        assert found(run) == whole, (step, lose.__name__)
    assert resumed >= (2 if places == "few" else len(many) // 4)


def test_what_a_finished_run_is_for_is_on_the_disk(go: Callable[..., tuple[int, Path]]) -> None:
    status, memory = go("run")
    assert status == 0, Path("said").read_text()
    whole = found(Path("run"))
    lose_names(Path("run"), memory)
    assert found(Path("run")) == whole
    lose_content(Path("run"), memory)
    assert found(Path("run")) == whole
