"""A run's folder is never one that holds something else, and nothing that is not a run's is ever removed."""

import os
from pathlib import Path

import pytest
from conftest import content

from lit_recon.fit.output.folder import (
    NEXT_CONFIG,
    OF_A_START,
    RUN_FILES,
    announce_output,
    begin_output,
    check_output,
    clear_output,
    left_behind,
    undo_output,
)


def test_a_new_or_empty_folder_is_accepted_without_being_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=False)
    check_output(tmp_path / "a" / "b", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_with_files_but_no_run_is_refused_also_for_overwriting(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a run"):
        check_output(tmp_path, overwrite=True)


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        check_output(tmp_path / "file" / "run", overwrite=True)


def test_clearing_removes_a_runs_files_and_no_others(tmp_path: Path) -> None:
    for name in RUN_FILES:
        path = tmp_path / name
        if "." in name:
            path.write_text("old")
        else:
            path.mkdir()
            (path / "old").write_text("old")
    for name in ("notes.txt", "config.yaml"):  # a run that is killed meanwhile can be taken up
        (tmp_path / name).write_text("mine")
    clear_output(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "notes.txt"]


def test_a_file_with_two_names_is_left_behind_once(tmp_path: Path) -> None:
    for name in ("commits", "checkpoint"):
        (tmp_path / name).mkdir()
    (tmp_path / "commits" / "layer").write_bytes(bytes(1000))
    os.link(tmp_path / "commits" / "layer", tmp_path / "checkpoint" / "shard")
    (tmp_path / "checkpoint" / "rest").write_bytes(bytes(10))
    assert left_behind(tmp_path) == 1010


def test_what_a_run_left_that_was_killed_as_it_began_is_no_obstacle(tmp_path: Path) -> None:
    for name in OF_A_START:
        (tmp_path / name).write_text("half")
    check_output(tmp_path, overwrite=False)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a run"):
        check_output(tmp_path, overwrite=True)


def test_a_configuration_takes_the_place_of_an_earlier_one_or_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert announce_output(tmp_path, "a: 1\n") == tmp_path / "config.yaml"
    begin_output(tmp_path, "a: 1\n")
    (tmp_path / "results.json").write_text("old")
    assert announce_output(tmp_path, "a: ä\n") == tmp_path / NEXT_CONFIG
    assert content(tmp_path) == {"config.yaml": b"a: 1\n", "results.json": b"old", NEXT_CONFIG: "a: ä\n".encode()}
    begin_output(tmp_path, "a: ä\n")
    assert content(tmp_path) == {"config.yaml": "a: ä\n".encode()}

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        begin_output(tmp_path, "a: 3\n")
    assert content(tmp_path) == {"config.yaml": "a: ä\n".encode()}


def test_folders_that_were_made_go_but_not_those_that_hold_something(tmp_path: Path) -> None:
    made = [tmp_path / "a" / "b" / "c", tmp_path / "a" / "b", tmp_path / "a"]
    made[0].mkdir(parents=True)
    undo_output(made)
    assert list(tmp_path.iterdir()) == []
    made[0].mkdir(parents=True)
    (tmp_path / "a" / "other").write_text("")
    undo_output(made)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]
