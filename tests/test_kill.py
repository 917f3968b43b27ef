"""Runs are killed and gone on with: what they leave is that of a run that nothing has interrupted, byte for byte."""

import random
import re
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
    "overlapping": ("windows=blocks", "windows.size=2", "windows.stride=1", "chain.inputs=mix"),
}
KILLS = 6  # for each of the settings
STEPS = 250  # by which the disk changes in a run that writes 4 KiB at once, about


def found(run: Path) -> dict[str, object]:
    """What a run is for: checkpoint, masks, numbers."""
    masks = (run / "masks.safetensors").read_bytes()
    return {"checkpoint": content(run / "checkpoint"), "masks": masks, "numbers": numbers(run)}


@pytest.fixture
def go(
    launcher: Launcher, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    """Start or go on with a run, and have it killed where it is asked for."""
    monkeypatch.chdir(tmp_path)

    def go(run: str, *overrides: str, after: float | None = None, die_at: int | None = None) -> Ended:
        begun = (Path(run) / "config.yaml").is_file()
        settings = [*tiny_settings(model_folder, text_file), *overrides, f"output_dir={run}"]
        running = launcher.start(*([f"resume={run}"] if begun else settings), die_at=die_at)
        if after is not None:
            time.sleep(after)
            running.send(signal.SIGKILL)
        return running.wait()

    return go


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_that_is_killed_at_any_instant_ends_with_the_same_bytes(go: Callable[..., Ended], kind: str) -> None:
    draw, overrides = random.Random(kind), SETTINGS[kind]
    start = time.monotonic()
    ended = go("whole", *overrides)
    seconds = time.monotonic() - start
    assert ended.status == 0, ended.err
    whole = found(Path("whole"))
    kills, runs = [], 0
    while True:
        run = f"run{runs}"
        left = len(kills) < KILLS
        timed = {"after": draw.uniform(0.1, 0.9) * seconds} if len(kills) % 2 else {"die_at": draw.randint(1, STEPS)}
        ended = go(run, *overrides, **timed if left else {})
        if ended.status == 0:
            assert found(Path(run)) == whole, f"killed {kills}"
            runs += 1
            if not left:
                break
        else:
            assert ended.status == -signal.SIGKILL, f"after {kills}: {ended}"
            kills.append({run: timed})
            if (Path(run) / "results.json").is_file():  # killed after its last step
                runs += 1


def test_a_run_that_is_killed_while_it_begins_can_be_started_again(go: Callable[..., Ended]) -> None:
    assert go("whole").status == 0
    for step in (1, 2):  # its configuration: synced, then renamed
        assert go("run", die_at=step).status == -signal.SIGKILL
        assert not Path("run/config.yaml").exists()
    ended = go("run", die_at=3)  # while checkpoint/ is made
    assert ended.status == -signal.SIGKILL
    ended = go("run")
    assert ended.status == 0 and "no window was done: from the start" in ended.out, ended
    assert found(Path("run")) == found(Path("whole"))


def test_a_run_that_is_killed_in_the_commit_of_each_window_loses_that_window_at_most(go: Callable[..., Ended]) -> None:
    assert go("whole").status == 0
    done, step = [], 0
    while True:  # each time one commit further
        step += 23
        ended = go("run", die_at=step)
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended
        done.append(len(re.findall(r"\d/3 block", ended.out)))
    assert found(Path("run")) == found(Path("whole"))
