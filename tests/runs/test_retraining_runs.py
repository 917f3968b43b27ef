"""Runs that train all layers at once: what they leave, how they are stopped and resumed, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, content, numbers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_recon.fit.resume_point import ResumePoint
from lit_recon.reconstruction.fit_state import FitState

Run = Callable[..., Ended]
GLOBAL = ("walk=global", "retraining.rate=1", "retraining.commit_every=2", "trainer.max_epochs=2")


def found(run: str = "run") -> dict[str, object]:
    """What a run is for: checkpoint, masks, numbers."""
    masks = (Path(run) / "masks.safetensors").read_bytes()
    return {"checkpoint": content(Path(run) / "checkpoint"), "masks": masks, "numbers": numbers(Path(run))}


def said(text: str) -> str:
    return " ".join(text.split())


def test_windows_are_pruned_only_and_all_layers_trained_at_once(run_once: Run) -> None:
    ended = run_once(*GLOBAL)
    *windows, last = json.loads(Path("run/results.json").read_text())["windows"]
    assert [one["name"] for one in windows] == ["block_00", "block_01", "block_02"] and last["name"] == "global"
    for one in windows:
        assert one["steps"] == 0 and one["held_out_after"] == one["held_out_before"] > 0
    assert last["steps"] == 8 and last["measure"] == "KL divergence"
    assert 0 < last["held_out_after"] < last["held_out_before"] and last["accepted"]
    assert "reconstruct nothing; 3 windows (block) are pruned" in said(ended.out)
    assert "all layers at once, 8 steps, kl_divergence" in said(ended.out) and "4/4 global" in ended.out
    results = json.loads(Path("run/results.json").read_text())
    assert results["recipe"]["walk"] == "global" and results["sparsity"]["prunable"] == pytest.approx(0.5)
    model, masks = AutoModelForCausalLM.from_pretrained("run/checkpoint"), load_file("run/masks.safetensors")
    assert all((model.get_parameter(name) == 0).sum() == model.get_parameter(name).numel() // 2 for name in masks)
    assert "pruned, then retrained, all layers at once" in Path("run/checkpoint/README.md").read_text()
    assert not Path("run/commits").exists()


class _Stop:
    """Interrupts a fit after so many of its commits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.steps: list[int] = []
        on_steps = ResumePoint.on_steps

        def then_stop(point: ResumePoint, fit: FitState) -> None:
            on_steps(point, fit)
            self.steps.append(fit.step)
            if len(self.steps) == after:
                raise KeyboardInterrupt

        monkeypatch.setattr(ResumePoint, "on_steps", then_stop)


@pytest.mark.parametrize("after", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_fit_of_all_layers_is_resumed_from_its_steps_and_ends_with_the_same_bytes(
    tiny_run: Run, run_once: Run, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    run_once(*GLOBAL)
    whole = found()
    with monkeypatch.context() as patched:
        stop = _Stop(patched, after)
        ended = tiny_run(*GLOBAL, "overwrite=true")
        assert ended.status == 1 and stop.steps == [2, 4, 6][:after], ended
        assert "all 3 windows are done, and all layers are not yet trained at once" in said(ended.err)
    with monkeypatch.context() as patched:
        stop = _Stop(patched, 99)
        ended = tiny_run("resume=run")
        assert ended.status == 0, ended
    assert f"3 of 4 windows are done, and {2 * after} steps of all layers at once" in said(ended.out)
    assert stop.steps == [2, 4, 6][after:], "what was done is not done again"
    assert found() == whole


class _Kill:
    """Copies what a run leaves that is killed right after a commit of its fit: the folder as it is then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[int, int]] = []  # tries before, and steps of this one
        on_steps = ResumePoint.on_steps

        def then_copy(point: ResumePoint, fit: FitState) -> None:
            on_steps(point, fit)
            self.steps.append((len(fit.tries), fit.step))
            shutil.copytree("run", f"killed/{len(self.steps)}")

        monkeypatch.setattr(ResumePoint, "on_steps", then_copy)

    def lasting(self, part: str) -> list[dict[str, int]]:
        """Of each commit the files of a part, and when they were written."""
        folders = [Path(f"killed/{index}/commits") for index in range(1, len(self.steps) + 1)]
        return [{file.name: file.stat().st_mtime_ns for file in one.glob(f"{part}.*")} for one in folders]


@pytest.fixture
def resumed_everywhere(
    tiny_run: Run, command: Run, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict, _Kill]]:
    """Makes a run, and resumes what it had left if it were killed at each commit of its fit: the same bytes each time.

    Returns the result of the fit, and what would have been left.
    """

    def make(*settings: str) -> tuple[dict, _Kill]:
        with monkeypatch.context() as patched:
            kill = _Kill(patched)
            ended = tiny_run(*GLOBAL, *settings)
        assert ended.status == 0, ended
        whole = found()
        for index, (_, step) in enumerate(kill.steps, start=1):
            shutil.rmtree("run")
            shutil.copytree(f"killed/{index}", "run")
            ended = command("resume=run")
            assert ended.status == 0 and f"and {step} steps of all layers at once" in said(ended.out), ended
            assert found() == whole, kill.steps[index - 1]
        return json.loads(Path("run/results.json").read_text())["windows"][-1], kill

    return make


# The rate rises with every step, so that the loss on held-out samples falls and then rises, at every second one:
# 0.484, 0.467, 0.447, 0.498, 0.447, 0.475, 0.466.
RISES = ("module.warmup=1", "module.optimizer.lr=4e-2", "retraining.commit_every=3", "trainer.max_epochs=3")


@pytest.mark.parametrize(
    ("settings", "steps", "kept_step", "commits"),
    [
        (("keep=best",), 12, 4, [3, 6, 9]),
        pytest.param(("patience=2",), 8, 8, [3, 6], marks=pytest.mark.slow),
        (("keep=best", "patience=2"), 8, 4, [3, 6]),
    ],
    ids=["best", "patience", "best and patience"],
)
def test_a_fit_that_is_killed_at_any_commit_keeps_the_state_and_ends_at_the_step_that_it_would_have(
    resumed_everywhere: Callable, settings: tuple[str, ...], steps: int, kept_step: int, commits: list[int]
) -> None:
    result, kill = resumed_everywhere(*RISES, *settings)
    assert result["accepted"] and result["stopped_early"] == ("patience=2" in settings)
    assert (result["steps"], result["kept_step"]) == (steps, kept_step) and kill.steps == [(0, one) for one in commits]
    if settings == ("keep=best",):
        _, second, third = kill.lasting("kept")
        assert set(second) == {"kept.0.00002.safetensors", "kept.0.00004.safetensors"}, "those of two commits"
        assert set(third) == {"kept.0.00004.safetensors"} and third.items() <= second.items(), "not written again"


@pytest.mark.parametrize("variant", ["mask", pytest.param("hadamard", marks=pytest.mark.slow)])
def test_low_rank_changes_are_resumed_in_each_of_two_tries_from_the_same_start(
    resumed_everywhere: Callable, variant: str
) -> None:
    """The anchor pulls towards what was drawn at the start of the try, which no commit holds."""
    rates = ("module.optimizer.lr=0.1", "module.retry_rates=[0.0625]", "retraining.commit_every=3")
    result, kill = resumed_everywhere(
        "module=mask_lora", "module.rank=4", f"module.variant={variant}", "module.anchor=0.1", *rates
    )
    assert result["accepted"] and len(result["tries"]) == 2
    assert kill.steps == [(0, 3), (0, 6), (1, 3), (1, 6)]


def test_a_run_that_shall_stop_before_all_layers_are_trained_at_once_goes_on_with_that(
    tiny_run: Run, run_once: Run
) -> None:
    run_once(*GLOBAL)
    whole = found()
    ended = tiny_run(*GLOBAL, "overwrite=true", "stop_after=3")
    assert ended.status == 0 and "all 3 windows are done" in said(ended.out), ended
    assert "| unfinished | 3 of 4 windows" in Path("run/checkpoint/README.md").read_text()
    ended = tiny_run("resume=run")
    assert ended.status == 0 and "3 of 4 windows are done" in said(ended.out), ended
    assert found() == whole


@pytest.mark.usefixtures("drawn")
def test_local_reconstruction_is_followed_by_a_global_one_on_other_samples_and_the_report_shows_both(
    tiny_run: Run,
) -> None:
    settings = ("walk=local_then_global", "loss@retraining.loss=ce", "retraining.max_epochs=1", "retraining.rate=0.5")
    ended = tiny_run(*settings, "trainer.max_epochs=2", "data.num_retraining=6")
    assert ended.status == 0, ended.err
    results = json.loads(Path("run/results.json").read_text())
    of_windows, own = results["tokens"]["calibration"], results["tokens"]["retraining"]
    assert own == of_windows * 6 / 8 and f"3 steps, cross_entropy, on {own} other tokens" in said(ended.out)
    assert f"{of_windows + own:,} calibration tokens" in Path("run/report.html").read_text()
    *windows, last = json.loads(Path("run/results.json").read_text())["windows"]
    assert all(one["accepted"] and one["steps"] == 8 for one in windows)
    assert last["name"] == "global" and last["measure"] == "cross-entropy" and last["steps"] == 3
    page = Path("run/report.html").read_text()
    assert "global" in page and "block_02" in page and Path("run/figures/error_over_depth.png").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("loss=kl", "loss=kl_divergence with walk=local: it is of the whole model"),
        ("loss=ce", "loss=cross_entropy with walk=local"),
        ("loss=hidden", "loss=hidden_states with walk=local"),
        ("walk=local_then_global loss=hidden", "loss=hidden_states with walk=local_then_global"),
        ("data.num_retraining=4", "data.num_retraining=4 with walk=local: those samples are for all layers"),
        ("walk=global windows=matrix", "walk=global with windows=matrix: windows are pruned only"),
        ("walk=global windows.head=true", "walk=global with windows.head=true"),
        ("walk=global windows=matrix module=least_squares", "walk=global with LeastSquares (module=least_squares)"),
        ("walk=global module=none", "walk=global with module=none"),
        ("walk=global retraining.rate=0", "retraining.rate=0: expected"),
        ("walk=global retraining.commit_every=0", "retraining.commit_every=0: expected"),
        ("walk=both", "walk=both: unknown; choose one of global, local, local_then_global"),
    ],
)
def test_what_does_not_fit_a_walk_is_refused_with_the_reason(tiny_run: Run, settings: str, reason: str) -> None:
    ended = tiny_run(*settings.split())
    assert ended.status == 2 and reason in said(ended.err), ended
    assert not Path("run").exists()


def test_the_plan_of_a_global_fit_and_a_limit_below_it(tiny_run: Run) -> None:
    ended = tiny_run(*GLOBAL, "plan=true")
    assert ended.status == 0 and "retrain all layers at once, 8 steps" in said(ended.out), ended
    ended = tiny_run(*GLOBAL, "memory_limit=1MB")
    assert ended.status == 2 and "memory_limit=1.00 MB" in said(ended.err), ended
    assert not Path("run").exists()
