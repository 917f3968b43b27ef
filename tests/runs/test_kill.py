"""Runs are killed and resumed: what they leave is that of a run that nothing has interrupted, byte for byte."""

import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, content, numbers, tiny_settings
from launcher import Launcher

SETTINGS = {
    "block": (),
    "half, sparse": ("windows=half", "chain.inputs=sparse", "chain.statistics=sparse", "prune_by=block"),
    "matrix, on disk": ("windows=matrix", "store=disk", "+trainer.limit_train_batches=2"),
    "in memory": ("model.name=IN_MEMORY",),  # a folder whose weights cannot be mapped
    "overlapping": ("windows=blocks", "windows.size=2", "windows.stride=1", "chain.inputs=mix"),
}
EXACTING = ("half, sparse", "matrix, on disk")  # a commit within what is pruned at once; activations in files
KILLS = 5  # for each of the settings
NEVER = 10**9  # a step that no run reaches


def found(run: Path) -> dict[str, object]:
    """What a run is for: checkpoint, masks, numbers."""
    masks = (run / "masks.safetensors").read_bytes()
    return {"checkpoint": content(run / "checkpoint"), "masks": masks, "numbers": numbers(run)}


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

    def go(run: str, *overrides: str, after: float | None = None, **faults: object) -> Ended:
        begun = (Path(run) / "config.yaml").is_file()
        given = [override.replace("IN_MEMORY", str(unmappable_folder)) for override in overrides]
        settings = [*tiny_settings(model_folder, text_file), *given, f"output_dir={run}"]
        running = launcher.start(*([f"resume={run}"] if begun else settings), **faults)
        if after is not None:
            time.sleep(after)
            running.send(signal.SIGKILL)
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
    "kind", [pytest.param(kind, marks=() if kind in EXACTING else pytest.mark.slow) for kind in SETTINGS]
)
def test_a_run_that_is_killed_at_any_instant_ends_with_the_same_bytes(go: Callable[..., Ended], kind: str) -> None:
    overrides = SETTINGS[kind]
    start = time.monotonic()
    ended = go("whole", *overrides, die_at=NEVER)
    seconds = time.monotonic() - start
    assert ended.status == 0, ended.err
    draw, whole = random.Random(kind), found(Path("whole"))
    kills: list[dict] = []
    for number in range(4 * KILLS):  # some kills come too late
        run = f"run{number}"
        while not (Path(run) / "results.json").is_file():
            when = {"die_at": draw.randint(1, ended.steps)} if len(kills) % 2 else {"after": draw.random() * seconds}
            when = when if len(kills) < KILLS else {}
            done = go(run, *overrides, **when)
            assert done.status in (0, -signal.SIGKILL), f"killed {kills}, then {when}: {done}"
            if done.status:
                kills.append(when)
        assert found(Path(run)) == whole, f"killed {kills}"
        if len(kills) == KILLS:
            return
    raise AssertionError(f"killed only {kills} of {seconds} s and {ended.steps} steps")


def test_a_run_that_is_killed_while_it_begins_can_be_started_again(
    go: Callable[..., Ended], counted: tuple[dict[str, object], int]
) -> None:
    for step in (1, 2):  # its configuration: synced, then renamed
        assert go("run", die_at=step).status == -signal.SIGKILL
        assert not Path("run/config.yaml").exists()
    for step in (3, 4, 6):  # while it loads; its configuration again; while checkpoint/ is made
        assert go("run", die_at=step).status == -signal.SIGKILL
    ended = go("run")
    assert ended.status == 0 and "no window was done: from the start" in ended.out, ended
    assert found(Path("run")) == counted[0]


@pytest.mark.parametrize(
    ("finished", "steps"),  # None, 3: while it loads; 4: the old run is cleared; 6: the new configuration is there
    [
        (True, (None, 4)),
        (False, (3, 6)),
        pytest.param(True, (3, 6), marks=pytest.mark.slow),
        pytest.param(False, (None, 4), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_as_it_overwrites_another_is_the_one_that_begins_again(
    launcher: Launcher,
    go: Callable[..., Ended],
    model_folder: Path,
    text_file: Path,
    finished: bool,
    steps: tuple[int | None, int],
) -> None:
    assert go("whole", "seed=5").status == 0
    assert go("old", *([] if finished else ["stop_after=1"])).status == 0
    for die_at in steps:
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree("old", "run")
        settings = [*tiny_settings(model_folder, text_file), "seed=5", "overwrite=true", "output_dir=run"]
        running = launcher.start(*settings, **({"die_at": die_at} if die_at else {}))
        while not die_at and not Path("run/config.next.yaml").exists():
            time.sleep(0.001)
        if not die_at:
            running.send(signal.SIGKILL)
        assert running.wait().status == -signal.SIGKILL
        loading = die_at in (None, 3)
        assert Path("run/results.json").exists() == (finished and loading)
        assert Path("run/commits").exists() == (not finished and loading)
        ended = go("run")
        assert ended.status == 0, ended
        assert found(Path("run")) == found(Path("whole")), die_at
        assert not Path("run/config.next.yaml").exists()


def test_what_is_to_be_overwritten_stays_where_the_new_run_is_interrupted_or_refused_as_it_loads(
    launcher: Launcher, go: Callable[..., Ended], model_folder: Path, text_file: Path
) -> None:
    assert go("run", "stop_after=1").status == 0
    before = content(Path("run"))
    settings = [*tiny_settings(model_folder, text_file), "seed=5", "overwrite=true", "output_dir=run"]
    running = launcher.start(*settings)
    while not Path("run/config.next.yaml").exists():
        time.sleep(0.001)
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.status == 1 and ended.err == "interrupted: run holds the earlier run as it was\n"
    assert content(Path("run")) == before
    assert launcher.run(*settings, "memory_limit=1MB").status == 2
    assert content(Path("run")) == before
    # But an announcement that a killed process left is not the refused one's to take back.
    shutil.copy("run/config.yaml", "run/config.next.yaml")
    assert launcher.run("resume=run", "memory_limit=1MB").status == 2
    assert Path("run/config.next.yaml").exists()


def test_a_run_that_is_killed_in_any_commit_loses_that_window_at_most(
    go: Callable[..., Ended], counted: tuple[dict[str, object], int]
) -> None:
    whole, steps = counted
    seen = set()
    for step in range(steps // 10, steps, steps // 10):
        ended = go("run", die_at=step)
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended
        committed = max((int(path.stem) for path in Path("run/commits").glob("*.json")), default=0)
        reached = max((int(number) for number in re.findall(r"(\d)/3 block", ended.out)), default=committed)
        assert reached - 1 <= committed <= reached
        seen.add((committed, reached - committed))
    assert {0, 1} == {lost for _, lost in seen}, f"kills inside and behind a commit: {seen}"
    assert go("run").status in (0, 2)  # 2: it was finished
    assert found(Path("run")) == whole


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
