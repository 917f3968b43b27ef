"""A run's folder is never one that holds something else, and nothing that is not a run's is ever removed."""

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import content

from lit_recon.fit.job import Output
from lit_recon.fit.output.folder import (
    NEXT_CONFIG,
    OF_A_START,
    RUN_FILES,
    begin_output,
    begun,
    check_output,
    clear_output,
    folder_state,
    left_behind,
    made,
)
from lit_recon.system.command_line import Refusal


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
    begin_output(tmp_path, "a: 1\n")
    (tmp_path / "results.json").write_text("old")
    begin_output(tmp_path, "a: ä\n")
    assert content(tmp_path) == {"config.yaml": "a: ä\n".encode()}

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        begin_output(tmp_path, "a: 3\n")
    assert content(tmp_path) == {"config.yaml": "a: ä\n".encode()}


def output(folder: Path, **settings: Any) -> Output:
    """What says where a run goes."""
    return Output(folder=folder, config={}, resume=False, plan_only=False, **{"found": folder_state(folder)} | settings)


def test_folders_that_were_made_go_but_not_those_that_hold_something(tmp_path: Path) -> None:
    for kept in ([], ["other"]):
        with pytest.raises(Refusal), made(output(tmp_path / "a" / "b" / "c")) as found:
            assert found.folder.is_dir()
            for name in kept:
                (tmp_path / "a" / name).write_text("")
            raise Refusal("no")
        assert [path.name for path in tmp_path.rglob("*")] == (["a", "other"] if kept else [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refusal), made(output(tmp_path / "empty")):
        raise Refusal("no")
    assert (tmp_path / "empty").is_dir(), "was there before"


def test_a_folder_that_is_named_after_the_time_has_a_number_where_the_name_is_taken(tmp_path: Path) -> None:
    for name in ("run", "run-2", "run-3"):
        with made(output(tmp_path / "run", named_by_time=True)) as found:
            assert found.folder == tmp_path / name and found.config["output_dir"] == str(found.folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [("config.yaml", "another run"), ("results.json", "a finished run"), (NEXT_CONFIG, "another run")],
)
def test_a_folder_that_has_changed_since_it_was_looked_at_is_refused(tmp_path: Path, name: str, says: str) -> None:
    before = output(tmp_path)
    (tmp_path / name).write_text("of another process")
    with pytest.raises(Refusal, match=f"holds {says} since this command began"), begun(before, "a: 1\n"):
        raise AssertionError("began")
    assert content(tmp_path) == {name: b"of another process"}
    with begun(output(tmp_path), "a: 1\n"):
        pass


def test_what_an_interrupted_start_finds_in_the_folder_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "results.json").write_text("{}")
    before = content(tmp_path)
    with pytest.raises(KeyboardInterrupt, match="holds the earlier run as it was"), begun(output(tmp_path), "a: 2\n"):
        raise KeyboardInterrupt
    assert content(tmp_path) == before
    with pytest.raises(KeyboardInterrupt, match="^$"), begun(output(tmp_path), "a: 2\n"):
        begin_output(tmp_path, "a: 2\n")
        raise KeyboardInterrupt
    assert content(tmp_path) == {"config.yaml": b"a: 2\n"}
