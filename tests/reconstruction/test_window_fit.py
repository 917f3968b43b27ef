"""A window gets better or stays as it was pruned, whatever the fit does; and nothing of it stays in memory."""

import gc
import re
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, Masks, chain_of, fitter, module, pruned_window, trainer, weights
from lightning import Callback, LightningModule
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_recon.activations.datamodule import Batch
from lit_recon.model.architectures import tiny_model
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import partition
from lit_recon.model.windows import Window
from lit_recon.modules.least_squares import LeastSquares
from lit_recon.modules.losses import mean_squared
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.modules.schedules import linear_with_warmup
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner
from lit_recon.reconstruction.driver import WalkCallback, walk
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.reconstruction.window_fit import WindowFitter
from lit_recon.reconstruction.window_result import WindowResult


def same(window: Window, before: dict[str, Tensor]) -> bool:
    """Whether every parameter still has exactly its value."""
    return all(torch.equal(parameter, before[name]) for name, parameter in window.named_parameters())


def test_training_a_window_lowers_its_held_out_error(model: PreTrainedModel, tokens_ST: Tensor, tmp_path: Path) -> None:
    data, window, masks = pruned_window(model, tokens_ST)
    before = weights(window)
    result = fitter(tmp_path, module()).fit(window, masks, data)
    assert result.accepted and result.note == "" and result.steps == 8
    assert 0 < result.held_out_after < 0.97 * result.held_out_before
    assert 0 < result.relative_error_after < 0.97 * result.relative_error_before
    assert not same(window, before)
    after = result.held_out_after, result.typical_after
    assert after == data.errors(window, data.unit())[1], "of the weights that are kept"
    assert 0 < result.typical_after < result.typical_before
    assert result.unit == data.unit() and result.rate == 1
    assert result.tries == [[1, *after]], "the rate, and the errors that it reached"
    assert result.measure == "relative error"


@pytest.mark.parametrize(
    ("settings", "tried"), [({"lr": 0.0}, "nothing"), ({"lr": 3.0}, "worse")], ids=["nothing learnt", "absurd rate"]
)
def test_a_window_that_does_not_improve_keeps_its_pruned_weights(
    tokens_ST: Tensor, tmp_path: Path, settings: dict, tried: str
) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before = weights(window)
    result = fitter(tmp_path, module(**settings)).fit(window, masks, data)
    assert not result.accepted and "did not improve" in result.note
    assert same(window, before)
    assert result.relative_error_after == result.relative_error_before
    assert result.held_out_after == result.held_out_before, "of the weights that are kept"
    assert result.typical_after == result.typical_before
    told = re.search(r"did not improve \((.*), typical (.*)\),", result.note)
    reached, before = [float(one) for one in told.groups()], [result.held_out_before, result.typical_before]
    if tried == "worse":
        assert reached[0] > before[0] and reached[1] > before[1]
    else:
        assert reached == pytest.approx(before, rel=1e-2)
    assert [rate for rate, *_ in result.tries] == [1, 0.25, 0.0625]
    assert result.tries[-1][1:] == pytest.approx(reached, rel=1e-2)


class Idle(LightningModule):
    """The smallest module that a user could write: a step without a loss, as with manual optimization."""

    def __init__(self, window: Window, masks: Masks, unit: float) -> None:
        super().__init__()
        self.window = window

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_a_module_whose_steps_have_no_loss_keeps_the_pruned_weights(tokens_ST: Tensor, tmp_path: Path) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before = weights(window)
    result = fitter(tmp_path, Idle).fit(window, masks, data)
    assert not result.accepted and "did not improve" in result.note and same(window, before)


class Solver(Idle):
    """A module that needs no optimizer, as a closed-form solution would."""

    def configure_optimizers(self) -> None:
        return None


def test_a_module_without_an_optimizer_runs(tokens_ST: Tensor, tmp_path: Path) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before = weights(window)
    assert not fitter(tmp_path, Solver).fit(window, masks, data).accepted
    assert same(window, before)


class Ascending(LightningModule):
    """A module that shares nothing with lit_recon's, and makes its window worse."""

    def __init__(self, window: Window, masks: Masks, unit: float) -> None:
        super().__init__()
        self.window = window

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return -(self.window(batch.inputs_BTD, batch.calls) - batch.targets_BTD).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def test_a_module_of_the_users_own_that_worsens_its_window_changes_nothing(tokens_ST: Tensor, tmp_path: Path) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before = weights(window)
    result = fitter(tmp_path, Ascending).fit(window, masks, data)
    assert not result.accepted and "did not improve" in result.note and same(window, before)
    assert result.held_out_after == result.held_out_before


class Diverging(MaskedWeights):
    """Its loss is not a number from step `when` on, at learning rates above `limit`; remembers the rates used."""

    limit = 0.0
    when = 0
    rates: list[float]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        group = self.trainer.optimizers[0].param_groups[0]
        self.rates.append(group["lr"])
        return loss * float("nan") if group["initial_lr"] > self.limit and batch_idx >= self.when else loss


@pytest.mark.parametrize("when", [0, 1], ids=["seen as the loss", "between the looks at the loss"])
def test_a_loss_that_is_never_finite_leaves_the_pruned_weights_after_three_tries(
    tokens_ST: Tensor, tmp_path: Path, when: int
) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before = weights(window)
    made = type("Always", (Diverging,), {"rates": [], "when": when})
    result = fitter(tmp_path, module(cls=made), max_epochs=1).fit(window, masks, data)
    assert same(window, before)
    assert not result.accepted and result.steps == 0
    assert result.note == "the loss was not finite, also at 0.0625 of the learning rate: kept its pruned weights"
    assert result.held_out_after == result.held_out_before
    assert result.relative_error_after == result.relative_error_before
    peaks = [1e-2, 5e-3, 2.5e-3, 1.25e-3, 6.25e-4, 3.125e-4] if when == 0 else [1e-2, 2.5e-3, 6.25e-4]
    expected = [peak * share for peak in peaks for share in ((1, 1 / 2)[:1] if when == 0 else (1, 1 / 2))]
    assert made.rates[:1] == expected[:1] and len(made.rates) == 6, "two steps of each try"


@pytest.mark.parametrize("scheduler", [linear_with_warmup, None], ids=["schedule", "constant"])
def test_a_window_that_diverges_is_reconstructed_at_exactly_a_quarter_of_the_rate(
    tokens_ST: Tensor, tmp_path: Path, scheduler: Callable | None
) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    made = type("AtFullRate", (Diverging,), {"rates": [], "limit": 0.3e-2})  # nor at half of it
    if scheduler is None:  # then groups have no initial_lr until the rate is lowered
        made.training_step = lambda self, batch, index: constant_rate_step(self, batch, index)
    settings = {"cls": made, "scheduler": scheduler, "warmup": 0.25}
    result = fitter(tmp_path, module(**settings)).fit(window, masks, data)
    assert result.accepted and result.steps == 8
    assert result.note == "the loss was not finite; reconstructed at 0.25 of the learning rate"
    shares = [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6] if scheduler else [1] * 8  # 2 of 8 steps warm up
    assert made.rates[-8:] == pytest.approx([2.5e-3 * share for share in shares])
    assert made.rates[0] == pytest.approx(1e-2 * shares[0])


def test_later_tries_that_make_the_window_worse_is_not_called_a_reconstruction(
    tokens_ST: Tensor, tmp_path: Path
) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before = weights(window)
    made = type("AtFullRate", (Diverging,), {"rates": [], "limit": 0.75e-2})
    made.training_step = lambda self, batch, index: -Diverging.training_step(self, batch, index)
    result = fitter(tmp_path, module(cls=made)).fit(window, masks, data)
    assert made.rates[-1] < made.limit, "the later tries were finite"
    assert not result.accepted and same(window, before)
    told = (
        r"held-out error did not improve \([\d.]+, typical [\d.]+\), also at 0\.0625 of the learning rate: kept its .*"
    )
    assert re.fullmatch(told, result.note)


@pytest.mark.parametrize(
    ("retry_rates", "peaks", "also"), [((), [1e-2], ""), ((0.5,), [1e-2, 5e-3], ", also at 0.5 of the learning rate")]
)
def test_a_window_that_does_not_improve_is_tried_again_at_the_retry_rates_and_no_others(
    tokens_ST: Tensor, retry_rates: tuple[float, ...], peaks: list[float], also: str
) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before = weights(window)
    made = type("Worsening", (Diverging,), {"rates": [], "limit": 1.0})
    made.training_step = lambda self, batch, index: -Diverging.training_step(self, batch, index)
    fitting = FitSettings(retry_rates=retry_rates)
    fits = WindowFitter(module(cls=made), trainer(max_epochs=1), device=CPU.device, seed=0, fitting=fitting)
    result = fits.fit(window, masks, data)
    assert made.rates == pytest.approx([peak * share for peak in peaks for share in (1, 1 / 2)]), "two steps per try"
    assert not result.accepted and same(window, before)
    told = rf"held-out error did not improve \([\d.]+, typical [\d.]+\){re.escape(also)}: kept its pruned weights"
    assert re.fullmatch(told, result.note), result.note


def constant_rate_step(diverging: Diverging, batch: Batch, batch_idx: int) -> Tensor:
    loss = MaskedWeights.training_step(diverging, batch, batch_idx)
    diverging.rates.append(diverging.trainer.optimizers[0].param_groups[0]["lr"])
    return loss * float("nan") if diverging.rates[-1] > diverging.limit else loss


class Shifting(torch.optim.SGD):
    """An optimizer that is not elementwise in the gradient: every weight moves a little."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> object:
        loss = super().step(closure)
        for group in self.param_groups:
            torch._foreach_add_(group["params"], 1e-9)
        return loss


def test_pruned_weights_that_an_optimizer_moves_are_put_back_to_zero(tokens_ST: Tensor, tmp_path: Path) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    assert (
        fitter(tmp_path, module(optimizer=partial(Shifting, lr=1e-1), loss=mean_squared))
        .fit(window, masks, data)
        .accepted
    )
    assert not any(matrix.weight[~masks[matrix.name]].any() for matrix in window.matrices())


class Reviving(MaskedWeights):
    """Moves every weight after the last step."""

    def on_train_end(self) -> None:
        torch._foreach_add_([parameter.data for parameter in self.window.parameters()], 1e-9)


def test_a_module_that_moves_pruned_weights_is_refused_with_the_matrix_named(tokens_ST: Tensor, tmp_path: Path) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    made = fitter(tmp_path, module(cls=Reviving))
    with pytest.raises(RuntimeError, match=r"moved pruned weights of model\.layers\.0\.self_attn\.q_proj\.weight"):
        made.fit(window, masks, data)


@pytest.mark.parametrize(
    ("num_samples", "parts"), [(4, [(0, 2), (4, 6)]), (2, [(0, 2), (2, 6)]), (5, [(0, 1), (5, 6)])]
)
def test_errors_are_mean_and_median_over_tokens_of_held_out_samples_and_of_as_many_calibration_samples(
    tokens_ST: Tensor, tmp_path: Path, num_samples: int, parts: list[tuple[int, int]]
) -> None:
    data, window, masks = pruned_window(tiny_model("gpt2"), tokens_ST, num_samples)
    inputs, targets = (states_STD.numpy().astype("f8") for states_STD in (data.inputs_STD, data.targets_STD))
    outputs = window(data.inputs_STD, data.batching.calls(torch.arange(6))).numpy().astype("f8")
    energies = np.sort(((targets - inputs)[:num_samples] ** 2).mean(-1), axis=None)
    unit = energies[(len(energies) - 1) // 2]
    expected = []
    for first, last in parts:
        errors = np.sort(((outputs - targets)[first:last] ** 2).mean(-1), axis=None) / unit
        expected.append((np.mean(errors), errors[(len(errors) - 1) // 2]))
    assert data.unit() == pytest.approx(unit, rel=1e-5)
    calibration, held_out = data.errors(window, data.unit())
    assert [calibration, held_out] == [pytest.approx(one, rel=1e-4) for one in expected]
    result = fitter(tmp_path, module()).fit(window, masks, data)
    assert result.relative_error_before == calibration.mean
    assert (result.held_out_before, result.typical_before) == held_out


def test_a_window_needs_no_gradients_after_its_fit(tokens_ST: Tensor, tmp_path: Path) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    fitter(tmp_path, module()).fit(window, masks, data)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in window.parameters())


class Inventory(WalkCallback):
    """After each window: what is still alive of its fit, and how many bytes of tensors Python holds."""

    def __init__(self) -> None:
        self.fits: list[weakref.ref] = []
        self.bytes: list[int] = []
        self.alive: list[str] = []

    def made(self, thing: object) -> object:
        self.fits.append(weakref.ref(thing))
        return thing

    def on_window_fit(self, result: WindowResult) -> None:
        self.alive += [type(thing).__name__ for ref in self.fits if (thing := ref()) is not None]
        storages = {
            found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
            for found in gc.get_objects()
            if issubclass(type(found), Tensor)
        }
        self.bytes.append(sum(storages.values()))


@pytest.mark.parametrize(("by", "per_layer"), [("block", 1), ("half", 2), ("matrix", 7)])
def test_memory_is_flat_over_the_windows_of_a_walk(tokens_ST: Tensor, tmp_path: Path, by: str, per_layer: int) -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    chain = chain_of(model, tokens_ST, 4)
    kept = Inventory()
    settings = module().keywords

    def make_optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return kept.made(settings["optimizer"](parameters))

    def make_module(*arguments: object) -> LightningModule:
        return kept.made(MaskedWeights(*arguments, **settings | {"optimizer": make_optimizer}))

    made = fitter(tmp_path, make_module, max_epochs=1)
    made.callbacks = [Callback()]  # lives as long as the walk, as a progress display does
    make_trainer = made.trainer
    made.trainer = lambda **arguments: kept.made(make_trainer(**arguments))
    walk(
        partition(model, by=by),
        chain=chain,
        pruner=Pruner(Magnitude(), Unstructured(sparsity=0.5), chain),
        fitter=made,
        weights=WeightOffloader(model, CPU.device),
        callbacks=[kept],
    )
    assert len(kept.fits) >= 6 * per_layer * 3, "some windows are tried again at a lower rate"
    assert kept.alive == [], "modules, Trainers or optimizers of windows that are done"
    by_layer = [kept.bytes[start : start + per_layer] for start in range(0, 6 * per_layer, per_layer)]
    for found in by_layer[2:]:  # in the first layer masters are made; the matrices of a layer differ in size
        assert found == by_layer[1], f"bytes of tensors after each window: {kept.bytes}"


@pytest.mark.parametrize("exact", [False, True], ids=["by gradient", "least squares"])
def test_a_matrix_that_has_nothing_to_be_trained_on_keeps_its_pruned_weights_and_says_so(
    tokens_ST: Tensor, tmp_path: Path, exact: bool
) -> None:
    """An expert with a module of its own that no token is routed to; a layer that was added as the identity."""
    model = tiny_model("llama")
    spare = nn.Linear(8, 4, bias=False)
    model.model.layers[1].mlp.spare = spare.requires_grad_(False)
    nn.init.zeros_(model.model.layers[1].self_attn.o_proj.weight)
    dense = spare.weight.clone()
    solver = partial(LeastSquares, tolerance=1e-3, max_iterations=10)
    chain = chain_of(model, tokens_ST, 4)
    results = walk(
        partition(model, by="matrix"),
        chain=chain,
        pruner=Pruner(Wanda(), Unstructured(sparsity=0.5), chain),
        fitter=fitter(tmp_path, solver if exact else module(), max_epochs=1),
        weights=WeightOffloader(model, CPU.device),
    )
    (result,) = [result for result in results if "spare" in result.name]
    assert not result.accepted and "no calibration or no held-out token reaches it" in result.note
    (result,) = [result for result in results if result.name == "block_01.self_attn.o_proj"]
    assert not result.accepted and "is zero already, so there is no error" in result.note
    assert torch.count_nonzero(spare.weight) == 16 and torch.equal(spare.weight, dense * (spare.weight != 0))
    assert sum(result.accepted for result in results) > 12, "the others are reconstructed"


@pytest.mark.parametrize(("lr", "expected"), [(1e-2, "nothing"), (1e-4, "some"), (1e-6, "all")])
def test_what_rounding_takes_of_the_gain_is_told(tokens_ST: Tensor, tmp_path: Path, lr: float, expected: str) -> None:
    tokens_ST = torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(4))
    data, window, masks = pruned_window(tiny_model("llama").bfloat16().float(), tokens_ST)
    before, dtypes = weights(window), [torch.bfloat16] * len(window.own_parameters())
    made = fitter(tmp_path, module(lr=lr))
    result = made.fit(window, masks, data, dtypes)
    for parameter in window.own_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, parameter.bfloat16().float())
    assert (result.held_out_after, result.typical_after) == data.errors(window, data.unit())[1]
    if expected == "nothing":
        assert result.accepted and result.lost_by_rounding < 0.05
    elif expected == "some":
        for name, parameter in window.named_parameters():
            parameter.data.copy_(before[name])
        exact = fitter(tmp_path, module(lr=lr)).fit(window, masks, data)
        gained, kept = (exact.held_out_before - one.held_out_after for one in (exact, result))
        assert result.accepted and result.lost_by_rounding == pytest.approx(1 - kept / gained, rel=1e-3)
        assert 0.05 < result.lost_by_rounding < 1
    else:
        assert not result.accepted and result.lost_by_rounding == 1 and same(window, before)
        assert result.note == "rounding to bfloat16 took all that training had gained: kept its pruned weights"


def test_a_remark_of_a_module_is_in_the_note_of_its_window(tokens_ST: Tensor, tmp_path: Path) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    made = type("Noting", (MaskedWeights,), {"note": "damped by 1"})
    assert fitter(tmp_path, module(cls=made)).fit(window, masks, data).note == "damped by 1"
