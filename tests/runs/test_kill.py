"""Runs are killed and resumed: what they leave is that of a run that nothing has interrupted, byte for byte.

What SIGKILL would leave is copied before each operation that changes the run's folder, and resumed from there.
"""

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, content, numbers, tiny_settings
from launcher import EVENTS, Launcher

SETTINGS = {
    "block": (),
    "half, sparse": ("windows=half", "chain.inputs=sparse", "chain.statistics=sparse", "prune_by=block"),
    "matrix, on disk": ("windows=matrix", "store=disk", "+trainer.limit_train_batches=2"),
    "in memory": ("model.name=IN_MEMORY",),  # a folder whose weights cannot be mapped
    "global": ("walk=global", "retraining.rate=1", "retraining.commit_every=3", "trainer.max_epochs=2"),
    "sparsegpt": ("criterion=sparsegpt",),  # its weights before training are files of their own
    "best, mask_lora": ("keep=best", "module=mask_lora", "trainer.max_epochs=2"),
    "overlapping": ("windows=blocks", "windows.size=2", "windows.stride=1", "chain.inputs=mix"),
}
STRIDES = {"block": 10, "global": 197}  # from one kill to the next by default
SWEPT = ("fsync", "crc32", *EVENTS)
DRAWN = {"report.html", "figures"}
NEVER = 10**9  # a step that no run reaches


def found(run: Path) -> dict[str, object]:
    """What a run is for: checkpoint, masks, numbers."""
    masks = (run / "masks.safetensors").read_bytes()
    return {"checkpoint": content(run / "checkpoint"), "masks": masks, "numbers": numbers(run)}


def names(run: Path) -> set[str]:
    """The names of all files and folders of a run, without those in figures/; TensorBoard's hold time and process."""
    paths = (path.relative_to(run).as_posix() for path in run.rglob("*"))
    return {re.sub(r"tfevents.*", "tfevents", path) for path in paths if not path.startswith("figures/")}


def state_of(run: Path) -> int:
    """What is in a folder, by which a copy that is like another is known."""
    return hash(tuple((str(path.relative_to(run)), path.is_file() and path.read_bytes()) for path in run.rglob("*")))


@pytest.fixture
def go(
    launcher: Launcher,
    model_folder: Path,
    unmappable_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Ended]:
    """Start or resume a run, and have it killed where it is asked for."""
    monkeypatch.chdir(tmp_path)

    def go(run: str, *overrides: str, **faults: object) -> Ended:
        begun = (Path(run) / "config.yaml").is_file()
        given = [override.replace("IN_MEMORY", str(unmappable_folder)) for override in overrides]
        settings = [*tiny_settings(model_folder, text_file), *given, f"output_dir={run}"]
        running = launcher.start(*([f"resume={run}"] if begun else settings), **faults)
        return running.wait()

    return go


@pytest.fixture(scope="module")
def counted(
    launcher: Launcher, model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, object], int]:
    """What a run finds that nothing interrupts, and by how many steps the disk changes."""
    run = tmp_path_factory.mktemp("whole") / "run"
    ended = launcher.run(*tiny_settings(model_folder, text_file), f"output_dir={run}", die_at=NEVER)
    assert ended.status == 0, ended.err
    return found(run), ended.steps


@pytest.mark.parametrize(
    ("kind", "every"),
    [
        *((kind, STRIDES.get(kind, 101)) for kind in SETTINGS),
        *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in SETTINGS),
    ],
)
def test_a_run_that_is_killed_before_any_operation_ends_with_the_same_bytes(
    launcher: Launcher, go: Callable[..., Ended], tmp_path: Path, kind: str, every: int
) -> None:
    ended = go("whole", *SETTINGS[kind], snapshots=str(tmp_path / "kills"), every=every, kinds=SWEPT, drawn=True)
    assert ended.status == 0, ended.err
    whole, everything = found(Path("whole")), names(Path("whole"))
    kills = sorted((tmp_path / "kills").iterdir())
    assert len(kills) > 200 / every
    seen = set()
    for kill in kills:
        run, state = kill / "run", state_of(kill / "run")
        if state in seen:
            continue
        seen.add(state)
        finished = (run / "results.json").exists()
        newest = max((run / "commits").glob("*.json"), default=None)
        committed = len(json.loads(newest.read_text())["state"]["windows"]) if newest else 0
        ended = go(str(run), *SETTINGS[kind], drawn=finished)
        if ended.status == 2:  # nothing was left to do
            assert "that run is finished" in ended.err and (run / "report.html").exists(), (kill, ended)
        else:
            assert ended.status == 0, (kill, ended)
        assert found(run) == whole, kill
        assert names(run) == (everything if finished else everything - DRAWN), kill
        if not finished:
            said = re.search(r"(\d+) of \d+ windows are done", ended.out)
            resumed = int(said[1]) if said else 0
            told = max(map(int, re.findall(r"^(\d+)/\d+ ", (kill / "out").read_text(), re.M)), default=0)
            assert told - 1 <= resumed >= committed, (kill, told, resumed, committed)
        shutil.rmtree(kill)


def test_a_run_that_is_killed_while_it_begins_can_be_started_again(
    go: Callable[..., Ended], counted: tuple[dict[str, object], int]
) -> None:
    for step in (1, 2):  # its configuration: synced, then renamed
        assert go("run", die_at=step).status == -signal.SIGKILL
        assert not Path("run/config.yaml").exists()
    for step in (3, 4, 6, 8):  # while it loads; its configuration again, twice; while checkpoint/ is made
        assert go("run", die_at=step).status == -signal.SIGKILL
    ended = go("run")
    assert ended.status == 0 and "no window was done: from the start" in ended.out, ended
    assert found(Path("run")) == counted[0]


@pytest.mark.parametrize("finished", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_is_to_be_overwritten_is_there_until_it_is_cleared_and_then_the_new_run_counts(
    launcher: Launcher, go: Callable[..., Ended], model_folder: Path, text_file: Path, finished: bool
) -> None:
    assert go("whole", "seed=5").status == 0
    assert go("old", *([] if finished else ["stop_after=1"])).status == 0
    settings = [*tiny_settings(model_folder, text_file), "seed=5", "overwrite=true", "output_dir=run"]
    # A link is tried; config.next.yaml: synced, renamed; all is cleared; config.yaml: synced, renamed; then the run.
    for die_at in (1, 2, 3, 4, 5, 6):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree("old", "run")
        changes = ("fsync", "replace", "link")  # no checksums: what the dense model was measured at is read before
        assert launcher.run(*settings, die_at=die_at, kinds=changes).status == -signal.SIGKILL
        assert Path("run/config.next.yaml").exists() == (die_at in (4, 5))
        if die_at < 4:
            (Path("run") / "config.next.yaml.partial").unlink(missing_ok=True)
            assert content(Path("run")).items() >= content(Path("old")).items()
            ended = go("run")
            assert ended.status == 0, ended  # goes on with what was there, or draws its report
            assert json.loads(Path("run/results.json").read_text())["seed"] == 0
        else:
            assert not Path("run/results.json").exists() and not Path("run/commits").exists()
            ended = go("run")
            assert ended.status == 0, ended
            assert found(Path("run")) == found(Path("whole")), die_at
        assert not Path("run/config.next.yaml").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_only_begins_to_overwrite_another_leaves_it(
    launcher: Launcher, go: Callable[..., Ended], model_folder: Path, text_file: Path, number: int
) -> None:
    assert go("run", "stop_after=1").status == 0
    before = content(Path("run"))
    settings = [*tiny_settings(model_folder, text_file), "seed=5", "overwrite=true", "output_dir=run"]
    running = launcher.start(*settings)
    while not Path("run/lease.json").exists():
        time.sleep(0.001)
    running.send(number)
    ended = running.wait()
    if number == signal.SIGINT:
        assert ended.status == 1 and ended.err == "interrupted: run holds the earlier run as it was\n"
        assert content(Path("run")) == before
        assert launcher.run(*settings, "memory_limit=1MB").status == 2
        assert content(Path("run")) == before
    ended = go("run")
    assert ended.status == 0 and "1 of 3 windows are done" in ended.out, ended
    assert json.loads(Path("run/results.json").read_text())["seed"] == 0


def test_a_run_that_is_killed_between_a_commit_and_its_shard_has_that_layer_in_the_end(
    go: Callable[..., Ended],
) -> None:
    assert go("whole").status == 0
    # Before layer 1 is put into checkpoint/, where layer 0 was; the first link only tries whether there are any.
    assert go("run", die_at=3, kinds=["link"]).status == -signal.SIGKILL
    assert Path("run/commits/00002.json").exists()
    shard = "checkpoint/model-00003-of-00004.safetensors"
    assert Path("run", shard).read_bytes() != Path("whole", shard).read_bytes()
    ended = go("run")
    assert ended.status == 0 and "2 of 3 windows are done" in ended.out, ended
    assert found(Path("run")) == found(Path("whole"))
