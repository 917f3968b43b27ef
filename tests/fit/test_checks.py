"""Mistakes are found before anything happens, together, and nothing that is not a run is ever removed."""

import os
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import content, module
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

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
from lit_recon.model.architectures import tiny_model
from lit_recon.model.matrices import Matrix
from lit_recon.model.partition import layer_windows
from lit_recon.model.windows import AnyWindow, HalfWindow
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.pruning.patterns import NM, Unstructured
from lit_recon.system.command_line import (
    Problems,
    check_module,
    check_optimizer,
    check_pattern,
    check_scored,
    check_steps,
    quiet,
)


def test_all_problems_are_told_at_once() -> None:
    problems = Problems()
    for sparsity in (2.0, 0.5, -1.0):
        problems.check(lambda value: Unstructured(sparsity=value), sparsity)
    with pytest.raises(ValueError, match=r"sparsity=2\.0.*\n.*sparsity=-1\.0"):
        problems.raise_all()


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


def test_a_thread_that_fails_is_told_unless_the_disk_failed_which_tensorboard_tells_the_main_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back at the end
    monkeypatch.setattr(threading, "__excepthook__", lambda failure: told.append(failure.exc_type))
    with warnings.catch_warnings():
        quiet()
    for error in (OSError(28, "No space left on device"), KeyError("a mistake")):

        def fail(error: Exception = error) -> None:
            raise error

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert told == [KeyError]


def matrices_of(model: PreTrainedModel) -> list[Matrix]:
    """All matrices of its layers."""
    return [matrix for window in layer_windows(model) for matrix in window.matrices()]


def test_misfitting_matrices_are_named_and_the_rest_counted() -> None:
    matrices = matrices_of(tiny_model("llama"))
    check_pattern(matrices, NM(n=2, m=4))
    with pytest.raises(ValueError, match=r"q_proj\.weight.*\n(.*\n)*\.\.\. and 18 more"):
        check_pattern(matrices, NM(n=2, m=5))


def test_a_matrix_that_no_criterion_can_score_is_refused_unless_allowed() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.experts = nn.Parameter(torch.zeros(2, 16, 32))
    matrices = matrices_of(model)
    check_scored(matrices_of(tiny_model("llama")), allow_unscored=False)
    with pytest.raises(ValueError, match=r"1 of 22 matrices \(\d+\.\d% .*mlp\.experts.*allow_unscored=true"):
        check_scored(matrices, allow_unscored=False)
    check_scored(matrices, allow_unscored=True)


@pytest.mark.parametrize("steps", [(0, -1, 1), (-1, -1, 1), (1, 0, 1), (1, -1, 0), (1.5, -1, 1)])
def test_training_never_or_for_ever_is_refused(steps: tuple[float, int, int]) -> None:
    with pytest.raises(ValueError, match="trainer.max_epochs"):
        check_steps(*steps)
    check_steps(1, -1, 1)
    check_steps(-1, 5, 2)


class OnHalves(MaskedWeights):
    """A module for halves only."""

    def __init__(self, window: AnyWindow, *given: object, **settings: object) -> None:
        if not isinstance(window, HalfWindow):
            raise ValueError("for halves")
        super().__init__(window, *given, **settings)


def made(window: AnyWindow, masks: object, variance: float, *, optimizer: object) -> None:
    """A function that makes modules, but not of every window."""
    raise ValueError("not of this one")


def divided(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """A schedule that needs 100 steps or fewer."""
    return LambdaLR(optimizer, lambda step: 1 / (100 - num_training_steps))


def test_only_constructors_of_lit_recon_are_tried_on_a_window_and_arguments_of_all() -> None:
    (layer, *_) = layer_windows(tiny_model("llama"))
    check_module(module(), layer, single=False)
    check_module(module(cls=OnHalves), layer, single=False)
    check_module(partial(made, optimizer=None), layer, single=False)
    with pytest.raises(ValueError, match="module: .*'momentum'"):
        check_module(partial(made, optimizer=None, momentum=1), layer, single=False)
    with pytest.raises(ValueError, match=r"module\.warmup=2: expected"):
        check_module(module(warmup=2), layer, single=True)
    with pytest.raises(ValueError, match="module: .*'momentum'"):
        check_module(module(momentum=1), layer, single=False)


@pytest.mark.parametrize(("schedule", "told"), [(None, 0), (divided, 0), (torch.optim.lr_scheduler.StepLR, 1)])
def test_a_schedule_is_tried_but_may_be_made_for_other_numbers_of_steps(schedule: Callable | None, told: int) -> None:
    problems = Problems()
    check_optimizer(module(scheduler=schedule), problems, clipped=None)
    assert len(problems.found) == told
    assert all(found.startswith("module.scheduler: ") for found in problems.found)


def test_gradients_in_float16_are_not_clipped_by_a_fused_optimizer() -> None:
    for fused, told in ((True, ["trainer.gradient_clip_val=1.0"]), (False, [])):
        problems = Problems()
        check_optimizer(module(optimizer=partial(torch.optim.AdamW, fused=fused)), problems, clipped=1.0)
        assert [found.partition(" ")[0] for found in problems.found] == told
