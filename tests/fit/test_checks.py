"""Mistakes are found before anything happens, together."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import module
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from lit_recon.data.packing import PADDING
from lit_recon.data.source import Samples
from lit_recon.fit.checks import check_module, check_optimizer, check_samples, check_steps
from lit_recon.fit.library import prune_and_reconstruct
from lit_recon.fit.pruning_checks import check_pattern, check_scored
from lit_recon.model.architectures import tiny_model
from lit_recon.model.matrices import Matrix
from lit_recon.model.partition import layer_windows
from lit_recon.model.windows import AnyWindow, HalfWindow
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.pruning.patterns import NM, Unstructured
from lit_recon.system.command_line import Problems


def test_all_problems_are_told_at_once() -> None:
    problems = Problems()
    for sparsity in (2.0, 0.5, -1.0):
        problems.check(lambda value: Unstructured(sparsity=value), sparsity)
    with pytest.raises(ValueError, match=r"sparsity=2\.0.*\n.*sparsity=-1\.0"):
        problems.raise_all()


def matrices_of(model: PreTrainedModel) -> list[Matrix]:
    """All matrices of its layers."""
    return [matrix for window in layer_windows(model) for matrix in window.matrices()]


def test_misfitting_matrices_are_named_and_the_rest_counted() -> None:
    matrices = matrices_of(tiny_model("llama"))
    check_pattern(matrices, {one.name: [NM(n=2, m=4)] for one in matrices})
    with pytest.raises(ValueError, match=r"q_proj\.weight.*\n(.*\n)*\.\.\. and 18 more"):
        check_pattern(matrices, {one.name: [NM(n=2, m=5)] for one in matrices})


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


def made(window: AnyWindow, masks: object, unit: float, *, optimizer: object) -> None:
    """A function that makes modules, but not of every window."""
    raise ValueError("not of this one")


def divided(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """A schedule that needs 100 steps or fewer."""
    return LambdaLR(optimizer, lambda step: 1 / (100 - num_training_steps))


def test_only_constructors_of_lit_recon_are_tried_on_a_window_and_arguments_of_all() -> None:
    model = tiny_model("llama")
    check_module(module(), model, single=False)
    check_module(module(cls=OnHalves), model, single=False)
    check_module(partial(made, optimizer=None), model, single=False)
    with pytest.raises(ValueError, match="module: .*'momentum'"):
        check_module(partial(made, optimizer=None, momentum=1), model, single=False)
    with pytest.raises(ValueError, match=r"module\.warmup=2: expected"):
        check_module(module(warmup=2), model, single=True)
    with pytest.raises(ValueError, match="module: .*'momentum'"):
        check_module(module(momentum=1), model, single=False)


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


@pytest.mark.parametrize("part", ["calibration", "held-out", "evaluation"])
def test_a_token_without_a_row_in_the_embedding_is_refused_in_each_part(part: str) -> None:
    parts = {name: torch.full((2, 4), 63) for name in ("calibration", "held-out", "evaluation")}
    parts["calibration"][0, -1] = PADDING
    model = tiny_model("llama")
    check_samples(model, Samples(*parts.values(), description="x"))
    parts[part][1, 2] = 64
    with pytest.raises(
        ValueError, match=f"the {part} text has the token 64, and the model's embedding 64 rows, 0 to 63"
    ):
        check_samples(model, Samples(*parts.values(), description="x"))
    with pytest.raises(ValueError, match="model's own tokenizer"):
        prune_and_reconstruct(model, Samples(*parts.values(), description="x"))


def test_samples_of_retraining_are_looked_at_like_others_and_need_a_walk_that_trains_on_them() -> None:
    model, parts = tiny_model("llama"), [torch.full((2, 4), 63) for _ in range(3)]
    with pytest.raises(ValueError, match="the retraining text has the token 64"):
        check_samples(model, Samples(*parts, description="x", retraining_ST=torch.full((3, 4), 64)))
    other = Samples(*parts, description="x", retraining_ST=torch.full((3, 5), 63))
    with pytest.raises(ValueError, match="retraining_ST has samples of 5 tokens, and calibration_ST of 4"):
        prune_and_reconstruct(model, other)
    with pytest.raises(ValueError, match="data.num_retraining=3 with walk=local: those samples are for all layers"):
        prune_and_reconstruct(model, Samples(*parts, description="x", retraining_ST=parts[0].repeat(2, 1)[:3]))


@pytest.mark.parametrize("shape", ["llama", "gpt2"])  # which call it by other names
def test_samples_longer_than_the_trained_context_are_told_by_setting(
    shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokens = tiny_model(shape), torch.zeros(2, 64, dtype=torch.long)
    caplog.clear()  # what transformers says of the tiny model
    check_samples(model, Samples(tokens, tokens, tokens, description="x"))
    assert not caplog.records
    longer = torch.zeros(2, 65, dtype=torch.long)
    check_samples(model, Samples(longer, longer, tokens, description="x"))
    (record,) = caplog.records
    assert record.getMessage().startswith("data.length=65: longer than the context") and "64 tokens" in caplog.text
