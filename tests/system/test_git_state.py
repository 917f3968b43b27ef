"""Commit and state of a repository, and that nothing in it runs."""

import os
import subprocess
from pathlib import Path

import pytest

from lit_recon.system.git_state import git_state


def git(folder: Path, *arguments: str) -> str:
    names = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | names).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One with a commit of mine.py."""
    folder = tmp_path / "caf\u00e9 \udce9"  # a name of two encodings
    (folder / "inner").mkdir(parents=True)
    git(folder, "init", "--quiet")
    (folder / "inner" / "mine.py").write_text("SHARE = 0.5\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    return folder


def test_a_repository_without_changes_is_its_commit(repository: Path) -> None:
    mine = repository / "inner" / "mine.py"
    (repository / "runs").mkdir()
    (repository / "runs" / "results.json").touch()  # that git does not know makes nothing dirty
    state = git_state(mine.parent, [mine])
    assert state and state["commit"] == git(repository, "rev-parse", "HEAD") and state["dirty"] is False
    assert Path(state["repository"]).name.startswith("caf\u00e9")


def test_changed_new_and_uncommitted_files_make_it_dirty(repository: Path, tmp_path: Path) -> None:
    mine, new = repository / "inner" / "mine.py", repository / "new.py"
    new.touch()
    assert (git_state(repository, [mine]) or {})["dirty"] is False
    assert (git_state(repository, [mine, new]) or {})["dirty"] is True
    assert git_state(repository, [new], only_known=True) is None, "it lies there by chance"
    mine.write_text("SHARE = 0.6\n")
    assert (git_state(repository, [mine]) or {})["dirty"] is True
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "--quiet")
    assert git_state(empty, []) == {"repository": str(empty), "commit": None, "dirty": True}


def test_without_repository_or_git_there_is_no_state(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert git_state(tmp_path, []) is None and git_state(tmp_path / "nowhere", []) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(repository, []) is None


def test_a_variable_of_git_does_not_lead_to_another_repository(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    assert git_state(tmp_path, []) is None


def test_what_the_configuration_of_a_repository_names_does_not_run(repository: Path, tmp_path: Path) -> None:
    monitor = tmp_path / "monitor"
    monitor.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    monitor.chmod(0o755)
    git(repository, "config", "core.fsmonitor", str(monitor))
    git(repository, "status")
    assert (tmp_path / "ran").exists(), "git itself would run it"
    (tmp_path / "ran").unlink()
    assert git_state(repository, [repository / "inner" / "mine.py"])
    assert not (tmp_path / "ran").exists()
