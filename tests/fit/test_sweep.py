"""Runs of a sweep: each by itself, whatever becomes of the others; what is done is not done again."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import Ended

from lit_recon.fit import study
from lit_recon.fit.forecast import Forecast
from lit_recon.fit.study import Pace, Standing, run_study, standing
from lit_recon.report.run_files import read_results
from lit_recon.settings import sweep
from lit_recon.settings.sweep import Member, run_apart

CONFIG = {"seed": 0, "overwrite": False, "plan": False, "memory_limit": None, "experiment_dir": "runs"}
HYDRA = ["hydra.mode=RUN"]


def member(folder: str, **settings: Any) -> Member:
    """A run of a sweep into a folder of this name."""
    config = CONFIG | {"output_dir": folder} | settings
    return Member(folder, [f"output_dir={folder}"], HYDRA, config, named_by_time=False)


def begun(one: Member, *files: str, windows: int | None = None, **settings: Any) -> Path:
    """Its folder, as a run with these other settings left it."""
    assert one.config
    folder = Path(one.config["output_dir"])
    (folder / "commits").mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).write_text("{}")
    (folder / "config.yaml").write_text(yaml.safe_dump(one.config | settings))
    if windows is not None:
        (folder / "commits/00007.json").write_text(json.dumps({"state": {"windows": [{}] * windows}}))
        (folder / "commits/00006.json").write_text(json.dumps({"state": {"windows": []}}))
    return folder


def finished(one: Member, **settings: Any) -> Path:
    """The same of a finished run."""
    return begun(one, "results.json", "report.html", **settings)


class Started:
    """Processes that a sweep starts, none of which is real.

    Attributes:
        runs: Name of each run, with the words that the sweep added.
        reports: Folders of each report.
        statuses: Exit status by name; 0 for others, which leave a finished run.
        forecast: Forecast of each run.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[str, list[str]]] = []
        self.reports: list[list[str]] = []
        self.statuses: dict[str, int] = {}
        self.forecast: dict[str, Forecast] = {}
        self.seconds = 0.0

    def run(self, program: str, one: Member, *, more: Sequence[str] = (), **_: Any) -> int:
        """A run."""
        assert program == "lit_recon.fit"
        self.runs.append((one.name, list(more)))
        self.seconds += 20
        status = self.statuses.get(one.name, 0)
        if not status:
            finished(one)
        return status

    def report(self, command: Sequence[str], **_: Any) -> SimpleNamespace:
        """The report."""
        assert list(command[1:3]) == ["-m", "lit_recon.report"]
        assert list(command[-2:]) == ["--out", str(Path("runs/report"))]
        self.reports.append(list(command[3:-2]))
        return SimpleNamespace(returncode=self.statuses.get("report", 0))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Started:
    """In an empty working directory."""
    made = Started()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "run_apart", made.run)
    monkeypatch.setattr(study, "forecasts", lambda members: made.forecast)
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=made.report))
    monkeypatch.setattr(study, "time", SimpleNamespace(monotonic=lambda: made.seconds))
    return made


def runs(*members: Member) -> Mapping[str, int]:
    """The exit statuses of a sweep over them."""
    return run_study("lit_recon.fit", members, tracebacks=False)


def test_done_runs_are_skipped_interrupted_ones_resumed_and_others_kept(
    started: Started, capfd: pytest.CaptureFixture[str]
) -> None:
    done, left, other, new = (member(name) for name in ("done", "left", "other", "new"))
    finished(done)
    begun(left, windows=3)
    finished(other, seed=7)
    assert runs(done, left, other, new) == {"done": 0, "left": 0, "other": 2, "new": 0}
    assert started.runs == [("left", ["resume=left"]), ("new", [])]
    assert started.reports == [["done", "left", "new"]]
    said = capfd.readouterr().out
    assert said.startswith("4 runs: 1 done, 1 to be resumed, 1 not to be run, 1 to be started\ndone: done (done)\n")
    assert "to be resumed: left (left, after window 3)" in said
    assert "other holds another run: seed is 7 there and 0 here; overwrite=true replaces it" in said


@pytest.mark.parametrize("said", ['{"state": {"windows": 3}}', '{"state": []}', "[1]", "{"])
def test_a_damaged_commit_is_no_obstacle_to_a_survey(started: Started, said: str) -> None:
    left = member("left")
    (begun(left, windows=3) / "commits/00008.json").write_text(said)
    assert standing(left) == Standing("left", Path("left"))


def test_a_sweep_that_is_given_again_starts_nothing_and_draws_its_report(started: Started) -> None:
    members = [member("a"), member("b")]
    runs(*members)
    assert runs(*members) == {"a": 0, "b": 0}
    assert [name for name, _ in started.runs] == ["a", "b"] and started.reports == [["a", "b"]] * 2


def test_a_failing_run_stops_no_other_and_the_report_has_what_it_left(started: Started) -> None:
    begun(member("a"), windows=1)
    started.statuses |= {"a": 1, "c": 2, "report": 2}  # the report says that one is not finished
    assert runs(member("a"), member("b"), member("c")) == {"a": 1, "b": 0, "c": 2}
    assert started.reports == [["a", "b"]]


def test_where_nothing_is_finished_there_is_no_report(started: Started) -> None:
    begun(member("a"), windows=1)
    started.statuses["a"] = 1
    assert runs(member("a")) == {"a": 1}
    assert started.reports == []


def test_a_report_that_fails_shows_in_the_exit_status(started: Started) -> None:
    started.statuses["report"] = 2
    assert runs(member("a")) == {"a": 0, "report": 2}


def test_overwrite_does_all_again(started: Started) -> None:
    for name in ("a", "b"):
        finished(member(name))
    assert runs(member("a", overwrite=True), member("b", overwrite=True)) == {"a": 0, "b": 0}
    assert started.runs == [("a", []), ("b", [])]


def test_settings_of_a_call_do_not_make_it_another_run(started: Started) -> None:
    finished(member("a"), overwrite=True, memory_limit="1GiB", experiment_dir="elsewhere", output_dir="/moved/a")
    assert standing(member("a")) == Standing("done", Path("a"))


@pytest.mark.parametrize("files", [(), ("results.json",), ("results.json", "report.html", "config.next.yaml")])
def test_a_run_that_was_killed_before_its_end_is_left_also_without_a_window(
    files: tuple[str, ...], started: Started
) -> None:
    folder = begun(member("a"), *files)
    if "config.next.yaml" in files:  # killed as it began to replace a finished run
        (folder / "config.next.yaml").write_text((folder / "config.yaml").read_text())
    assert standing(member("a")) == Standing("left", Path("a"))


def test_damaged_configurations_and_folders_named_by_the_time_are_for_the_run_to_judge(started: Started) -> None:
    (begun(member("a")) / "config.yaml").write_text("{ half a line")
    assert standing(member("a")) == Standing("new", Path("a"))
    finished(member("b"))
    assert standing(Member("b", [], [], member("b").config, named_by_time=True)).kind == "new"
    assert standing(Member("b", [], [], None, named_by_time=False)).kind == "new"


def test_a_run_that_another_command_finishes_meanwhile_is_not_started(started: Started) -> None:
    first, second = member("first"), member("second")
    run = started.run

    def run_and_see_the_other_finish(*given: Any, **settings: Any) -> int:
        finished(second)
        return run(*given, **settings)

    study.run_apart = run_and_see_the_other_finish  # type: ignore[assignment]
    assert runs(first, second) == {"first": 0, "second": 0}
    assert [name for name, _ in started.runs] == ["first"]


@pytest.mark.parametrize("settings", [{"plan": True}, {"experiment_dir": None}])
def test_plans_and_sweeps_that_are_no_experiment_have_no_report(settings: dict, started: Started) -> None:
    runs(member("a", **settings))
    assert started.reports == []


def test_time_left_is_what_plans_predict_scaled_by_what_runs_took(
    started: Started, capfd: pytest.CaptureFixture[str]
) -> None:
    members = [member(name) for name in ("a", "b", "c")]
    begun(members[2], windows=3)
    started.forecast = {one.name: Forecast(seconds=8, load=2, windows=4) for one in members}
    runs(*members)
    said = capfd.readouterr().out
    assert "about 24.0 s for 3 runs" in said, "10 + 10 + 2 + 8 / 4"
    assert "1 of 3 runs ended; about 28.0 s for 2 runs" in said, "each takes 20 s, twice what was predicted"
    assert "2 of 3 runs ended; about 8.0 s for 1 run" in said


def test_runs_of_earlier_calls_scale_it_too_and_what_is_refused_is_said_before_the_first(
    started: Started, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(member("done"))
    results = {"predicted": {"seconds": 9.0}, "seconds": {"load": 1.0, "total": 40.0}}
    monkeypatch.setattr(study, "read_results", lambda folder: results)
    started.forecast = {"a": Forecast(seconds=10), "b": Forecast(refused="data.length=1: give 2 or more")}
    runs(member("done"), member("a"), member("b"))
    said = capfd.readouterr().out
    assert "will be refused: b: data.length=1: give 2 or more\nabout 80.0 s for 2 runs\n" in said


def test_nothing_is_claimed_where_nothing_is_known() -> None:
    pace = Pace()
    assert pace.left(["a"]) is None
    pace.learn_from(Path("nowhere"))
    assert (pace.predicted, pace.measured) == (0, 0)
    with pytest.raises(ValueError):
        read_results(Path("nowhere"))


def test_ctrl_c_ends_the_sweep_with_the_way_to_continue_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Process:
        waited = 0

        def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
            assert list(command[1:]) == ["-m", "lit_recon.fit", "output_dir=a", "resume=a", *HYDRA]

        def __enter__(self) -> "Process":
            return self

        def __exit__(self, *error: object) -> None:
            assert self.waited == 2, "until the run has said what it leaves"

        def wait(self) -> int:
            self.waited += 1
            if self.waited == 1:
                raise KeyboardInterrupt
            return 1

    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    with pytest.raises(SystemExit) as end:
        run_apart("lit_recon.fit", member("a"), more=["resume=a"], remedy="give it again", tracebacks=False)
    assert end.value.code == 1 and capfd.readouterr().err == "interrupted: give it again.\n"


@pytest.mark.slow
def test_runs_of_a_sweep_know_their_number_and_are_resumed_by_the_same_command(tiny_run: Callable[..., Ended]) -> None:
    words = ["seed=1,2", "output_dir=run_${hydra:job.num}"]
    ended = tiny_run(*words, "stop_after=1", "-m")
    assert ended.status == 0, ended.err
    assert sorted(path.name for path in Path().iterdir()) == ["run_0", "run_1"]
    ended = tiny_run(*words, "-m")
    assert ended.status == 0, ended.err
    assert "2 runs: 2 to be resumed\n" in ended.out and "(run_1, after window 1)" in ended.out
    assert "1 of 3 windows are done" in ended.out and "2/3 block_01" in ended.out
    assert all(Path(run, "results.json").is_file() for run in ("run_0", "run_1"))


def test_a_refused_run_does_not_stop_the_sweep_but_shows_in_its_exit_status(
    tiny_run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "forecasts", lambda members: {})  # a process: test_experiments.py has it
    Path("seed_1").mkdir()
    Path("seed_1/thesis.tex").write_text("years of work")
    ended = tiny_run("seed=1,2", "output_dir=seed_${seed}", "-m")
    assert ended.status == 1
    assert "output_dir=seed_1 holds files that are not a run" in ended.err
    assert ended.err.endswith("1 of 2 runs failed: seed=1\n") and "== seed=2 ==" in ended.out
    assert "2 runs: 2 to be started\nhow long they take is not known before the first has ended\n" in ended.out
    assert Path("seed_2/results.json").exists()
    assert [path.name for path in Path("seed_1").iterdir()] == ["thesis.tex"]


def test_one_folder_for_all_runs_of_a_sweep_is_refused_before_the_first(tiny_run: Callable[..., Ended]) -> None:
    ended = tiny_run("experiment=criteria")  # tiny_run gives output_dir=run
    assert ended.status == 2 and "experiment_dir=<folder>" in ended.err
    assert list(Path().iterdir()) == []


def test_a_mistake_beside_the_choices_of_a_sweep_is_told_in_one_message(command: Callable[..., Ended]) -> None:
    ended = command("-m", "windows=block,half", "data.foo=1")
    assert ended.status == 2
    assert len(ended.err.splitlines()) == 1 and "data.foo: unknown setting; data has" in ended.err
