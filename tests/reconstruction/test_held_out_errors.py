"""A window is run over the samples as often as its targets, training and curve need; measuring it adds little."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, chain_of, fitter, module, pruned_window, trainer
from torch import Tensor, nn

from lit_recon.activations.datamodule import Batch
from lit_recon.activations.propagation import Propagation
from lit_recon.model.architectures import tiny_model
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import partition
from lit_recon.modules.mask_lora import MaskLora
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner
from lit_recon.reconstruction.driver import walk
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.reconstruction.window_fit import WindowFitter
from lit_recon.system.finite import NotFinite

TRAINED, HELD_OUT = 4, 2  # samples of two batches, and of one
# Calibration errors before, on as many samples as are held out, and after; the held-out curve at steps 0, 1 and 2.
FIT = 2 * HELD_OUT + TRAINED + 3 * HELD_OUT


@contextmanager
def counted(window: nn.Module) -> Iterator[list[int]]:
    """How many samples each run of a window sees."""
    found: list[int] = []
    hook = window.register_forward_pre_hook(lambda _, args: found.append(len(args[0])))
    yield found
    hook.remove()


@pytest.mark.parametrize("inputs", ["dense", "sparse"])
def test_a_window_is_run_over_the_samples_as_often_as_is_needed(tokens_ST: Tensor, tmp_path: Path, inputs: str) -> None:
    model = tiny_model("llama")
    chain = chain_of(model, tokens_ST, TRAINED, propagation=Propagation(inputs=inputs))
    windows = partition(model)
    with counted(windows[1]) as samples:
        results = walk(
            windows,
            chain=chain,
            pruner=Pruner(Wanda(), Unstructured(sparsity=0.5), chain),
            fitter=fitter(tmp_path, module(lr=1e-3), max_epochs=1),
            weights=WeightOffloader(model, CPU.device),
        )
    assert results[1].accepted and len(results[1].tries) == 1
    everything = TRAINED + HELD_OUT
    assert sum(samples) == FIT + everything * {"dense": 1, "sparse": 2}[inputs], "targets; and the sparse chain's step"


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_further_try_costs_its_training_and_its_curve_alone(tokens_ST: Tensor, keep: str) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST, TRAINED)
    fits = WindowFitter(
        module(lr=3.0), trainer(max_epochs=1), device=CPU.device, seed=0, fitting=FitSettings(keep=keep)
    )
    with counted(window) as samples:
        result = fits.fit(window, masks, data)
    assert len(result.tries) == 3 and not result.accepted
    assert sum(samples) == 3 * (TRAINED + 2 * HELD_OUT) + 2 * HELD_OUT, "before: calibration and held-out, once"


def test_what_is_rounded_is_measured_once_more(tokens_ST: Tensor, tmp_path: Path) -> None:
    data, window, masks = pruned_window(tiny_model("llama").bfloat16().float(), tokens_ST, TRAINED)
    dtypes = [torch.bfloat16] * len(window.own_parameters())
    with counted(window) as samples:
        result = fitter(tmp_path, module(), max_epochs=1).fit(window, masks, data, dtypes)
    assert result.accepted and sum(samples) == FIT + HELD_OUT
    assert (result.held_out_after, result.typical_after) == data.errors(window, data.unit())[1]


class Moving(MaskedWeights):
    """Changes its window after the last validation, in ways of which autograd knows nothing."""

    def on_train_end(self) -> None:
        for parameter in self.window.parameters():
            parameter.data.mul_(0.999)


class Otherwise(MaskedWeights):
    """Validates on something else than the window's outputs for the batch."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        outputs_BTD = self.window(2 * batch.inputs_BTD, batch.calls)
        self.log("loss/held_out", outputs_BTD.square().mean(), batch_size=batch.num_tokens)


class Replacing(MaskedWeights):
    """Validates the window with other weights in the place of its own."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        others = {name: one * 0.5 for name, one in self.window.named_parameters()}
        outputs_BTD = torch.func.functional_call(self.window, others, (batch.inputs_BTD, batch.calls))
        self.log("loss/held_out", outputs_BTD.square().mean(), batch_size=batch.num_tokens)


NO_SANITY_CHECK, NO_VALIDATION = {"num_sanity_val_steps": 0}, {"limit_val_batches": 0}
NONE_AT_THE_END = {"max_steps": 1, "val_check_interval": 2}


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        *((cls, {}) for cls in (MaskedWeights, Moving, Otherwise, Replacing, MaskLora)),
        *((MaskedWeights, settings) for settings in (NO_SANITY_CHECK, NO_VALIDATION, NONE_AT_THE_END)),
        (MaskLora, NO_SANITY_CHECK),
    ],
)
def test_errors_are_those_of_the_weights_before_and_after_whatever_a_module_validates(
    tokens_ST: Tensor, tmp_path: Path, cls: type, settings: dict[str, Any]
) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST, TRAINED)
    before = data.errors(window, data.unit())
    result = fitter(tmp_path, module(cls=cls, lr=1e-3), **{"max_epochs": 1} | settings).fit(window, masks, data)
    after = data.errors(window, data.unit())
    assert result.accepted and len(result.tries) == 1
    assert (result.relative_error_before, result.relative_error_after) == (before[0].mean, after[0].mean)
    assert (result.held_out_before, result.typical_before) == before[1]
    assert (result.held_out_after, result.typical_after) == after[1]


def test_dropout_has_no_part_in_errors_that_are_measured_as_training_starts(tokens_ST: Tensor, tmp_path: Path) -> None:
    data, window, masks = pruned_window(tiny_model("opt"), tokens_ST, TRAINED)
    before = data.errors(window, data.unit())[1]
    result = fitter(tmp_path, module(), max_epochs=1, num_sanity_val_steps=0).fit(window, masks, data)
    assert (result.held_out_before, result.typical_before) == before


def test_a_held_out_error_that_is_not_finite_ends_the_fit_before_a_step(tokens_ST: Tensor, tmp_path: Path) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST, TRAINED)
    data.targets_STD[-1, -1, -1] = float("inf")
    made = fitter(tmp_path, module())
    with pytest.raises(NotFinite, match="block_00: its error on held-out samples, pruned, is not finite"):
        made.fit(window, masks, data)


class Logged:
    """A logger's `log_metrics`, remembered."""

    def __init__(self, log: Callable[..., None]) -> None:
        self.log, self.points = log, []

    def __call__(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.points += [(step, metrics[name]) for name in metrics if name == "loss/held_out"]
        self.log(metrics, step)


def test_the_curve_of_each_try_starts_with_the_pruned_window(tokens_ST: Tensor, tmp_path: Path) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST, TRAINED)
    made = fitter(tmp_path, module(lr=3.0), max_epochs=1)
    logged = made.logger.log_metrics = Logged(made.logger.log_metrics)
    assert len(made.fit(window, masks, data).tries) == 3
    assert [step for step, _ in logged.points] == [0, 0, 1] * 3
    assert len({value for _, value in logged.points[::3]}) == 1
