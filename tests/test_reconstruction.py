"""A window gets better or stays as it was pruned, whatever the fit does; and nothing of it stays in memory."""

import gc
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, tiny_model
from hydra.utils import instantiate
from lightning import LightningModule, Trainer
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.activations import Batch, Chain
from lit_recon.blocks import Decoder
from lit_recon.checkpoint import Checkpoint
from lit_recon.criteria.magnitude import Magnitude
from lit_recon.driver import walk
from lit_recon.fit import CONF
from lit_recon.logger import RunLogger
from lit_recon.masks import Unstructured
from lit_recon.metrics import Clock, relative_error
from lit_recon.modules.reconstruction import ReconstructionModule
from lit_recon.modules.schedules import linear_with_warmup
from lit_recon.reconstruction import Reconstructor, Statistics, WindowResult, prune
from lit_recon.windows import Window, partition

Masks = Mapping[str, Tensor]


def trainer(**settings: object) -> Callable[..., Trainer]:
    """The Trainer of the real configuration, on the CPU in float32."""
    return instantiate(OmegaConf.load(CONF / "fit.yaml").trainer, accelerator="cpu", precision="32-true", **settings)


def module(lr: float = 1e-2, **settings: object) -> Callable[..., LightningModule]:
    """The module of the real configuration; `settings` replace its arguments, `cls` itself."""
    made = instantiate(OmegaConf.load(CONF / "module" / "reconstruction.yaml"), _convert_="all")
    optimizer = partial(made.keywords["optimizer"], lr=lr)
    return partial(settings.pop("cls", made.func), **made.keywords | {"optimizer": optimizer} | settings)


def pruned_window(model: PreTrainedModel, tokens_ST: Tensor, num_samples: int = 4) -> tuple[Chain, Window, Masks]:
    """The model's first window, half of its weights zeroed, with the chain that holds its dense targets."""
    chain = Chain(Decoder(model, CPU.device), tokens_ST, num_samples=num_samples, batch_size=2, compute=CPU)
    window = partition(model)[0]
    chain.dense_pass(window, nullcontext())
    matrices = window.matrices()
    return chain, window, prune(matrices, Statistics(Magnitude(), matrices), Unstructured(sparsity=0.5))


def reconstructor(chain: Chain, run: Path, make: Callable[..., LightningModule], **settings: object) -> Reconstructor:
    """A Reconstructor as a run makes it, with four epochs unless `settings` of the Trainer say otherwise."""
    settings = {"max_epochs": 4} | settings
    return Reconstructor(make, trainer(**settings), chain=chain, logger=RunLogger(run), batch_size=2, seed=0)


def weights(window: Window) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in window.named_parameters()}


def same(window: Window, before: dict[str, Tensor]) -> bool:
    """Whether every parameter still has exactly its value."""
    return all(torch.equal(parameter, before[name]) for name, parameter in window.named_parameters())


def test_training_a_window_lowers_its_held_out_error(model: PreTrainedModel, tokens_ST: Tensor, tmp_path: Path) -> None:
    chain, window, masks = pruned_window(model, tokens_ST)
    before = weights(window)
    result = reconstructor(chain, tmp_path, module()).fit(window, masks)
    assert result.accepted and result.note == "" and result.steps == 8
    assert 0 < result.held_out_after < 0.97 * result.held_out_before
    assert 0 < result.relative_error_after < 0.97 * result.relative_error_before
    assert not same(window, before)
    variance = chain.target_variance()
    assert result.held_out_after == relative_error(window, chain, 4, 6, variance=variance), (
        "of the weights that are kept"
    )


@pytest.mark.parametrize(
    ("settings", "tried"), [({"lr": 0.0}, "nothing"), ({"lr": 3.0}, "worse")], ids=["nothing learnt", "absurd rate"]
)
def test_a_window_that_does_not_improve_keeps_its_pruned_weights(
    tokens_ST: Tensor, tmp_path: Path, settings: dict, tried: str
) -> None:
    chain, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before = weights(window)
    result = reconstructor(chain, tmp_path, module(**settings)).fit(window, masks)
    assert not result.accepted and "did not improve" in result.note
    assert same(window, before)
    assert result.relative_error_after == result.relative_error_before
    if tried == "worse":
        assert result.held_out_after > result.held_out_before, "what was tried is what is reported"


class Idle(LightningModule):
    """The smallest module that a user could write: a step without a loss, as with manual optimization."""

    def __init__(self, window: Window, masks: Masks, variance: float) -> None:
        super().__init__()
        self.window = window

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_a_module_whose_steps_have_no_loss_keeps_the_pruned_weights(tokens_ST: Tensor, tmp_path: Path) -> None:
    chain, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before = weights(window)
    result = reconstructor(chain, tmp_path, Idle).fit(window, masks)
    assert not result.accepted and "did not improve" in result.note and same(window, before)


class Solver(Idle):
    """A module that needs no optimizer, as a closed-form solution would."""

    def configure_optimizers(self) -> None:
        return None


def test_a_module_without_an_optimizer_runs(tokens_ST: Tensor, tmp_path: Path) -> None:
    chain, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before = weights(window)
    assert not reconstructor(chain, tmp_path, Solver).fit(window, masks).accepted
    assert same(window, before)


class Ascending(LightningModule):
    """A module that shares nothing with lit_recon's, and makes its window worse."""

    def __init__(self, window: Window, masks: Masks, variance: float) -> None:
        super().__init__()
        self.window = window

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return -(self.window(batch.inputs_BTD, batch.calls) - batch.targets_BTD).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def test_a_module_of_the_users_own_that_worsens_its_window_changes_nothing(tokens_ST: Tensor, tmp_path: Path) -> None:
    chain, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before = weights(window)
    result = reconstructor(chain, tmp_path, Ascending).fit(window, masks)
    assert not result.accepted and "did not improve" in result.note and same(window, before)
    assert result.held_out_after > result.held_out_before


class Diverging(ReconstructionModule):
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
def test_a_loss_that_is_never_finite_leaves_the_pruned_weights_after_two_tries(
    tokens_ST: Tensor, tmp_path: Path, when: int
) -> None:
    chain, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before = weights(window)
    made = type("Always", (Diverging,), {"rates": [], "when": when})
    result = reconstructor(chain, tmp_path, module(cls=made), max_epochs=1).fit(window, masks)
    assert same(window, before)
    assert not result.accepted and result.steps == 0
    assert "not finite" in result.note and "half the learning rate" in result.note and "kept" in result.note
    assert result.held_out_after == result.held_out_before
    assert result.relative_error_after == result.relative_error_before
    firsts = [rate for index, rate in enumerate(made.rates) if index % (when + 1) == 0]
    assert firsts == [1e-2, 5e-3], "once at the full rate, once at half of it"


@pytest.mark.parametrize("scheduler", [linear_with_warmup, None], ids=["schedule", "constant"])
def test_a_window_that_diverges_is_reconstructed_at_exactly_half_the_rate(
    tokens_ST: Tensor, tmp_path: Path, scheduler: Callable | None
) -> None:
    chain, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    made = type("AtFullRate", (Diverging,), {"rates": [], "limit": 0.75e-2})
    if scheduler is None:  # then groups have no initial_lr until the rate is halved
        made.training_step = lambda self, batch, index: constant_rate_step(self, batch, index)
    settings = {"cls": made, "scheduler": scheduler, "warmup": 0.25}
    result = reconstructor(chain, tmp_path, module(**settings)).fit(window, masks)
    assert result.accepted and result.steps == 8
    assert result.note == "loss was not finite: reconstructed at half the learning rate"
    shares = [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6] if scheduler else [1] * 8  # 2 of 8 steps warm up
    assert made.rates[-8:] == pytest.approx([5e-3 * share for share in shares])
    assert made.rates[0] == pytest.approx(1e-2 * shares[0])


def test_a_second_try_that_makes_the_window_worse_is_not_called_a_reconstruction(
    tokens_ST: Tensor, tmp_path: Path
) -> None:
    chain, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before = weights(window)
    made = type("AtFullRate", (Diverging,), {"rates": [], "limit": 0.75e-2})
    made.training_step = lambda self, batch, index: -Diverging.training_step(self, batch, index)
    result = reconstructor(chain, tmp_path, module(cls=made)).fit(window, masks)
    assert made.rates[-1] < made.limit, "the second try was finite"
    assert not result.accepted and same(window, before)
    assert result.note == "held-out error did not improve: kept its pruned weights"


def constant_rate_step(diverging: Diverging, batch: Batch, batch_idx: int) -> Tensor:
    loss = ReconstructionModule.training_step(diverging, batch, batch_idx)
    diverging.rates.append(diverging.trainer.optimizers[0].param_groups[0]["lr"])
    return loss * float("nan") if diverging.rates[-1] > diverging.limit else loss


class Shifting(torch.optim.SGD):
    """An optimizer that is not elementwise in the gradient: every weight moves a little."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> object:
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter += 1e-9
        return loss


def test_an_optimizer_that_moves_pruned_weights_is_refused_with_the_matrix_named(
    tokens_ST: Tensor, tmp_path: Path
) -> None:
    chain, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    made = reconstructor(chain, tmp_path, module(optimizer=partial(Shifting, lr=1e-2)))
    with pytest.raises(RuntimeError, match=r"moved pruned weights of model\.layers\.0\.self_attn\.q_proj\.weight"):
        made.fit(window, masks)


@pytest.mark.parametrize(("first", "last"), [(0, 4), (0, 3), (4, 6), (1, 6)])
def test_relative_error_is_mean_squared_error_over_variance(tokens_ST: Tensor, first: int, last: int) -> None:
    chain, window, _ = pruned_window(tiny_model("gpt2"), tokens_ST)
    outputs = window(chain.inputs_STD[first:last], chain.decoder.calls(tokens_ST[first:last])).numpy().astype("f8")
    targets = chain.targets_STD[first:last].numpy().astype("f8")
    expected = np.mean((outputs - targets) ** 2) / 0.7
    assert relative_error(window, chain, first, last, variance=0.7) == pytest.approx(expected, rel=1e-5)


def test_errors_are_of_held_out_samples_and_of_as_many_calibration_samples(tokens_ST: Tensor, tmp_path: Path) -> None:
    chain, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    variance = chain.target_variance()
    on_both = (
        relative_error(window, chain, 0, 2, variance=variance),
        relative_error(window, chain, 4, 6, variance=variance),
    )
    result = reconstructor(chain, tmp_path, module()).fit(window, masks)
    assert (result.relative_error_before, result.held_out_before) == on_both


def test_a_window_needs_no_gradients_after_its_fit(tokens_ST: Tensor, tmp_path: Path) -> None:
    chain, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    reconstructor(chain, tmp_path, module()).fit(window, masks)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in window.parameters())


class Inventory:
    """After each window: what is still alive of its fit, and how many bytes of tensors Python holds."""

    def __init__(self) -> None:
        self.fits: list[weakref.ref] = []
        self.bytes: list[int] = []
        self.alive: list[str] = []

    def made(self, thing: object) -> object:
        self.fits.append(weakref.ref(thing))
        return thing

    def window_done(self, result: WindowResult) -> None:
        self.alive += [type(thing).__name__ for ref in self.fits if (thing := ref()) is not None]
        storages = {
            found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
            for found in gc.get_objects()
            if issubclass(type(found), Tensor)
        }
        self.bytes.append(sum(storages.values()))


def test_memory_is_flat_over_the_windows_of_a_walk(tokens_ST: Tensor, tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=6, layer_types=None)
    chain = Chain(Decoder(model, CPU.device), tokens_ST, num_samples=4, batch_size=2, compute=CPU)
    kept = Inventory()
    settings = module().keywords

    def make_optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return kept.made(settings["optimizer"](parameters))

    def make_module(*arguments: object) -> LightningModule:
        return kept.made(ReconstructionModule(*arguments, **settings | {"optimizer": make_optimizer}))

    made = reconstructor(chain, tmp_path, make_module, max_epochs=1)
    make_trainer = made.trainer
    made.trainer = lambda **arguments: kept.made(make_trainer(**arguments))
    walk(
        partition(model),
        chain=chain,
        criterion=Magnitude(),
        pattern=Unstructured(sparsity=0.5),
        reconstructor=made,
        checkpoint=Checkpoint(model, CPU.device),
        clock=Clock(),
        listeners=[kept],
    )
    assert len(kept.fits) == 6 * 3
    assert kept.alive == [], "modules, Trainers or optimizers of windows that are done"
    assert len(set(kept.bytes)) == 1, f"bytes of tensors after each window: {kept.bytes}"
