"""States of folders: finished, running, stopped, failed, damaged and none at all, and what is said of each."""

import json
import os
import socket
from pathlib import Path

import pytest
from finished_run import make_run, results_of

from lit_recon.report import overview, page
from lit_recon.report.__main__ import main
from lit_recon.report.runs import as_setting, read_run, read_runs
from lit_recon.system.lock import hold, is_held

CONFIG = "seed: 3\nmodule:\n  optimizer:\n    lr: 0.0005\n  retry_rates:\n  - 0.25\noutput_dir: a\ncriterion: {}\n"


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command without the pages of runs, which take seconds."""
    monkeypatch.setattr(page, "write_report", lambda run, out: run)
    monkeypatch.setattr(overview, "write_overview", lambda runs, out, keys: runs[0].folder)


def begun(folder: Path, *files: str) -> Path:
    """The folder of a run that has begun, with more files in it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    for name in files:
        (folder / name).write_text("x", encoding="utf-8")
    return folder


def test_a_run_whose_folder_is_held_is_running_also_where_it_left_earlier_results(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", "results.json")
    with hold(run):
        found = read_run(run)
        assert found.state == "running" and found.is_expected and "in progress" in found.message
        assert is_held(run) and (run / "lease.json").exists(), "looking takes nothing away"
    assert not is_held(run)


def test_a_lock_that_a_killed_process_left_holds_nothing(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", "lease.lock", "commits.begun")
    ended = {"pid": 2**22 + 1, "host": socket.gethostname(), "since": "long ago"}  # no process has that number
    (run / "lease.json").write_text(json.dumps(ended), encoding="utf-8")
    assert not is_held(run)
    again = {"pid": os.getpid(), "host": socket.gethostname()}  # another process has its number by now
    (run / "lease.json").write_text(json.dumps(again), encoding="utf-8")
    assert not is_held(run) and read_run(run).state == "unfinished"


def test_a_stopped_run_can_be_resumed_and_one_without_a_window_has_failed(tmp_path: Path) -> None:
    stopped, failed = begun(tmp_path / "stopped", "commits.begun"), begun(tmp_path / "failed")
    assert read_run(stopped).state == "unfinished" and f"resume={stopped} goes on" in read_run(stopped).message
    assert read_run(failed).state == "failed" and "before its first window" in read_run(failed).message
    assert not read_run(stopped).is_expected and not read_run(failed).is_expected


def test_what_is_known_of_a_run_that_has_not_finished_are_its_settings(tmp_path: Path) -> None:
    config = read_run(begun(tmp_path / "run")).config
    assert config == {
        "seed": 3,
        "module.optimizer.lr": 0.0005,
        "module.retry_rates": [0.25],
        "output_dir": "a",
        "criterion": {},
    }
    assert [as_setting(value) for value in config.values()] == ["3", "0.0005", "[0.25]", "a", "{}"]


@pytest.mark.parametrize("content", ["a: [", "- 1\n", "{" * 1500, "a: !!python/object/apply:os.getcwd []", "\0"])
def test_a_damaged_config_is_a_remark_and_runs_no_code(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path / "run", results_of(1), curves=False)
    (run / "config.yaml").write_text(content, encoding="utf-8")
    found = read_run(run)
    assert found.state == "finished" and not found.config
    assert content == "- 1\n" or ("config.yaml: cannot be read" in found.remarks[0] and "\n" not in found.remarks[0])


def test_results_of_a_version_that_is_too_old_are_one_message_that_names_it(tmp_path: Path) -> None:
    results = results_of(1)
    del results["gap_recovered"]
    found = read_run(make_run(tmp_path / "old", results, curves=False))
    assert found.state == "damaged" and found.results is None
    assert "without gap_recovered; " in found.message and "written by lit_recon 0.1.0" in found.message


def test_every_state_is_listed_said_once_and_ends_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {
        "good": make_run(tmp_path / "good", results_of(1), curves=False),
        "failed": begun(tmp_path / "failed"),
        "stopped": begun(tmp_path / "stopped", "commits.begun"),
        "damaged": begun(tmp_path / "damaged", "results.json"),
        "running": begun(tmp_path / "running"),
        "empty": tmp_path / "empty",
    }
    runs["empty"].mkdir()
    with hold(runs["running"]):
        assert main(["--markdown", *map(str, runs.values())]) == 2
        said = capsys.readouterr()
        assert main([str(runs["good"]), str(runs["running"])]) == 0, "a run in progress is nothing wrong"
    rows = [row.split(" | ") for row in said.out.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [
        ("| good", "block"),
        ("| failed", "failed"),
        ("| stopped", "unfinished"),
        ("| damaged", "damaged"),
        ("| running", "running"),
    ]
    lines = said.err.splitlines()
    wrong = [f"{run}" for name, run in runs.items() if name != "good"]
    assert [sum(line.startswith((f"{run}: ", f"{run}/")) for line in lines) for run in wrong] == [1] * 5


def test_a_folder_that_is_given_twice_is_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", results_of(1), curves=False)
    assert len(read_runs([run, tmp_path / "run", tmp_path / "." / "run"])) == 1


def test_the_folder_of_an_earlier_overview_is_no_run_that_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", results_of(1), curves=False)
    (tmp_path / "report").mkdir()
    for name in ("report.html", "runs.csv"):
        (tmp_path / "report" / name).write_text("", encoding="utf-8")
    assert [found.folder for found in read_runs(sorted(tmp_path.iterdir()))] == [run]
    assert [found.folder for found in read_runs([run, *(tmp_path / "report").iterdir()])] == [run]
    assert [found.state for found in read_runs([tmp_path / "report"])] == ["no run"], "where it is all that was given"
