"""Runs that train all layers at once: what they leave, how they are stopped and resumed, and what is refused."""

import json
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
def test_local_reconstruction_is_followed_by_a_global_one_and_the_report_shows_both(tiny_run: Run) -> None:
    settings = ("walk=local_then_global", "loss@retraining.loss=ce", "retraining.max_epochs=1", "retraining.rate=0.5")
    ended = tiny_run(*settings, "trainer.max_epochs=2")
    assert ended.status == 0, ended.err
    *windows, last = json.loads(Path("run/results.json").read_text())["windows"]
    assert all(one["accepted"] and one["steps"] == 8 for one in windows)
    assert last["name"] == "global" and last["measure"] == "cross-entropy" and last["steps"] == 4
    page = Path("run/report.html").read_text()
    assert "global" in page and "block_02" in page and Path("run/figures/error_over_depth.png").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("loss=kl", "loss=kl_divergence with walk=local: it is of the whole model"),
        ("loss=ce", "loss=cross_entropy with walk=local"),
        ("loss=hidden", "loss=hidden_states with walk=local"),
        ("walk=local_then_global loss=hidden", "loss=hidden_states with walk=local_then_global"),
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
