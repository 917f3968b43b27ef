"""Signals at moments of a run that last microseconds: in a commit, as it loads, as it measures; links in its folder."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, content, numbers

from lit_recon.fit import run as module
from lit_recon.fit.output.checkpoint import ShardedFolder
from lit_recon.system.commits import Commits

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals that others can send")


def found(run: str) -> dict[str, object]:
    """What a run is for: checkpoint, masks, numbers."""
    masks = Path(run, "masks.safetensors").read_bytes()
    return {"checkpoint": content(Path(run, "checkpoint")), "masks": masks, "numbers": numbers(Path(run))}


@pytest.mark.parametrize(
    ("owner", "method", "number"),
    [
        (Commits, "commit", signal.SIGTERM),  # all of its files are written, its manifest is not
        pytest.param(Commits, "write", signal.SIGINT, marks=pytest.mark.slow),  # none of them
        pytest.param(ShardedFolder, "put", signal.SIGHUP, marks=pytest.mark.slow),  # its layer is not published
    ],
)
def test_a_signal_in_a_commit_waits_until_all_of_it_is_done(
    tiny_run: Callable[..., Ended],
    run_once: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    number: int,
) -> None:
    run_once()
    whole = found("run")
    shutil.rmtree("run")
    original, sent = getattr(owner, method), []

    def signalled(self: object, *given: object, **settings: object) -> object:
        if not sent and Path("run/commits/00001.json").exists():
            sent.append(number)
            signal.raise_signal(number)
        return original(self, *given, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, signalled)
        ended = tiny_run()
    assert sent and ended.status == 1 and "Traceback" not in ended.err
    done = 1 if owner is ShardedFolder else 2
    assert f"interrupted: {done} of 3 windows are done" in ended.err, ended.err
    assert Path(f"run/commits/{done:05}.json").exists() and not list(Path("run").rglob("*.partial"))
    assert tiny_run("resume=run").status == 0
    assert found("run") == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_says_as_much_and_leaves_no_scratch(
    tiny_run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def interrupted(*given: object, **settings: object) -> None:
        signal.raise_signal(number)

    with monkeypatch.context() as patch:  # hidden states are on disk by then
        patch.setattr(module, "plan_job", interrupted)
        ended = tiny_run("plan=true", "store=disk")
        assert (ended.status, ended.err) == (1, "interrupted: nothing was written.\n")
        assert not content(Path()) and not list(Path().iterdir())
        ended = tiny_run("store=disk")
        assert (ended.status, ended.err) == (1, "interrupted: resume it with resume=run\n")
        assert {path.name for path in Path("run").iterdir()} == {"config.yaml"}


def test_links_in_a_run_are_in_nobodys_way(
    tiny_run: Callable[..., Ended], run_once: Callable[..., Ended], tmp_path: Path
) -> None:
    run_once()
    whole = found("run")
    shutil.rmtree("run")
    assert tiny_run("stop_after=1").status == 0
    elsewhere = tmp_path / "elsewhere"
    shutil.move("run/checkpoint", elsewhere / "checkpoint")
    for name in ("checkpoint", "activations"):
        (elsewhere / name).mkdir(parents=True, exist_ok=True)
        Path("run", name).symlink_to(elsewhere / name)
    assert tiny_run("resume=run").status == 0
    assert found("run") == whole
    Path("run/figures").touch()
    for name in ("checkpoint", "commits"):
        shutil.rmtree(f"run/{name}") if Path("run", name).is_dir() and not Path("run", name).is_symlink() else None
        Path("run", name).unlink(missing_ok=True)
        Path("run", name).symlink_to(elsewhere / "nowhere")
    assert tiny_run("overwrite=true").status == 0
    assert found("run") == whole and not Path("run/checkpoint").is_symlink()
    assert not Path("run/figures").exists() and not (elsewhere / "nowhere").exists()
