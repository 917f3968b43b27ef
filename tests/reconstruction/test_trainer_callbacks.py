"""Which state of a fit is kept, when a fit ends early, and how it goes on after a loss that is not finite."""

from pathlib import Path

import pytest
import torch
from conftest import CPU, module, pruned_window, trainer, weights
from torch import Tensor

from lit_recon.activations.datamodule import Batch
from lit_recon.model.architectures import tiny_model
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.reconstruction.window_fit import WindowFitter
from lit_recon.reconstruction.window_result import WindowResult


class Scripted(MaskedWeights):
    """Logs losses on held-out samples by a script, one for each step; some losses are not finite. Notes what it saw."""

    script: tuple[float, ...]
    broken: tuple[int, ...] = ()  # training steps
    seen: list[dict[str, Tensor]]
    used: list[tuple[float, int, dict[str, Tensor]]]  # rate, states of the optimizer, weights

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        (optimizer,) = self.trainer.optimizers
        self.used.append((optimizer.param_groups[0]["lr"], len(optimizer.state), weights(self.window)))
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if len(self.used) - 1 in self.broken else loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss/held_out", self.script[self.trainer.global_step], batch_size=1)

    def on_validation_epoch_end(self) -> None:
        self.seen.append(weights(self.window))


def fitted(tokens_ST: Tensor, fitting: FitSettings, **script: object) -> tuple[WindowResult, dict, type[Scripted]]:
    """The result, the weights and what was seen of a fit of three epochs of two steps, each with a look afterwards."""
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    made = type("Made", (Scripted,), {"seen": [], "used": [], **script})
    make = module(lr=1e-2, cls=made, scheduler=None)
    every_step = trainer(max_epochs=3, log_every_n_steps=1)
    result = WindowFitter(make, every_step, device=CPU.device, seed=0, fitting=fitting).fit(window, masks, data)
    return result, weights(window), made


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_state_by_the_held_out_loss_is_kept_or_the_last_one(tokens_ST: Tensor) -> None:
    script = (1.0, 0.5, 0.2, 0.9, 0.3, 0.2, 0.8)
    result, found, made = fitted(tokens_ST, FitSettings(keep="best"), script=script)
    assert result.accepted and (result.steps, result.kept_step) == (6, 2)
    assert same(found, made.seen[2]) and not same(found, made.seen[6])
    assert result.note == "kept the best state, that after 2 of 6 steps"
    result, found, made = fitted(tokens_ST, FitSettings(), script=script)
    assert same(found, made.seen[6]) and (result.steps, result.kept_step, result.note) == (6, 6, "")


def test_the_start_is_among_the_states_of_which_the_best_is_kept(tokens_ST: Tensor) -> None:
    fitting = FitSettings(keep="best", retry_rates=())
    result, found, made = fitted(tokens_ST, fitting, script=(0.1, *(0.5,) * 6))
    assert not result.accepted and same(found, made.seen[0])


def test_the_last_state_is_kept_where_none_was_looked_at(tokens_ST: Tensor) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    rarely = trainer(max_epochs=3, max_steps=1, val_check_interval=2)
    fits = WindowFitter(module(scheduler=None), rarely, device=CPU.device, seed=0, fitting=FitSettings(keep="best"))
    result = fits.fit(window, masks, data)
    assert result.accepted and (result.steps, result.kept_step) == (1, 1)


@pytest.mark.parametrize(
    ("script", "steps"),
    [((1.0, 0.5, 0.6, 0.5, 0.1, 0.1, 0.1), 3), ((1.0, 1.0, 2.0, *(0.0,) * 4), 2), ((6, 5, 5.5, 4, 4.5, 3, 3.5), 6)],
    ids=["no smaller twice", "never smaller", "smaller each second time"],
)
def test_a_fit_ends_when_the_held_out_loss_became_no_smaller_so_many_times(
    tokens_ST: Tensor, script: tuple[float, ...], steps: int
) -> None:
    result, found, made = fitted(tokens_ST, FitSettings(patience=2), script=script)
    assert result.accepted and (result.steps, result.stopped_early) == (steps, steps < 6)
    assert same(found, made.seen[steps]), "the last state, as nothing else was asked for"
    said = f"stopped after {steps} steps: loss/held_out had become no smaller" if steps < 6 else ""
    assert result.note == said


@pytest.mark.parametrize(("keep", "returned"), [("last", 0), ("best", 1)])
def test_after_a_loss_that_is_not_finite_a_fit_goes_on_from_a_finite_state_at_half_the_rate_and_without_a_memory(
    tokens_ST: Tensor, keep: str, returned: int
) -> None:
    script = (1.0, 0.5, 0.6, 0.6, 0.6, 0.6, 0.4)
    fitting = FitSettings(keep=keep, retry_rates=())
    result, _, made = fitted(tokens_ST, fitting, script=script, broken=(2,))
    assert [rate for rate, _, _ in made.used] == [1e-2] * 3 + [0.5e-2] * 3
    assert made.used[2][1] > 0 and made.used[3][1] == 0, "the optimizer's state"
    assert same(made.used[3][2], made.seen[returned])
    assert result.halved and result.steps == 6
    assert result.note.startswith("the loss was not finite within 3 steps: went on at half the rate")


def test_a_second_loss_that_is_not_finite_ends_the_try(tokens_ST: Tensor) -> None:
    fitting = FitSettings(retry_rates=())
    result, found, made = fitted(tokens_ST, fitting, script=(0.5,) * 7, broken=(1, 2))
    assert not result.accepted and len(made.used) == 3 and same(found, made.seen[0])
    assert result.note == "the loss was not finite: kept its pruned weights"


def test_a_held_out_loss_that_is_not_finite_counts_as_well(tokens_ST: Tensor) -> None:
    result, _, made = fitted(tokens_ST, FitSettings(), script=(1.0, 0.5, float("nan"), 0.5, 0.5, 0.5, 0.5))
    assert result.accepted and result.halved and same(made.used[2][2], made.seen[0])


def test_the_best_state_of_a_module_that_does_not_log_the_held_out_loss_is_refused(
    tokens_ST: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="keep=best and patience need loss/held_out, which Made does not log"):
        fitted(tokens_ST, FitSettings(patience=1), validation_step=lambda self, batch, index: None)
