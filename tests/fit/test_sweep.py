"""Runs of a sweep: each by itself, whatever becomes of the others, and mistakes told before the first."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended


@pytest.mark.slow
def test_runs_of_a_sweep_know_their_number(tiny_run: Callable[..., Ended]) -> None:
    ended = tiny_run("seed=1,2", "output_dir=run_${hydra:job.num}", "stop_after=1", "-m")
    assert ended.status == 0, ended.err
    assert sorted(path.name for path in Path().iterdir()) == ["run_0", "run_1"]


def test_a_refused_run_does_not_stop_the_sweep_but_shows_in_its_exit_status(tiny_run: Callable[..., Ended]) -> None:
    Path("seed_1").mkdir()
    Path("seed_1/thesis.tex").write_text("years of work")
    ended = tiny_run("seed=1,2", "output_dir=seed_${seed}", "-m")
    assert ended.status == 1
    assert "output_dir=seed_1 holds files that are not a run" in ended.err
    assert ended.err.endswith("1 of 2 runs failed: seed=1\n") and "== seed=2 ==" in ended.out
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
