"""What each module trains of a window: its gradient against finite differences, what stays as it was, its memory."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CPU, fitter, module, pruned_window, trainer, weights
from lightning import LightningModule
from torch import Tensor

from lit_recon.activations.datamodule import Batch
from lit_recon.model.architectures import tiny_model
from lit_recon.model.vectors import vectors
from lit_recon.model.windows import Window
from lit_recon.modules.mask_lora import MaskLora
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.modules.norms_biases import NormsBiases
from lit_recon.modules.trained import attached, changed_by, trained_by
from lit_recon.modules.untrained import Untrained
from lit_recon.reconstruction.window_fit import WindowFitter

MODULES: dict[str, Callable[..., LightningModule]] = {
    "masked_weights": MaskedWeights,
    "norms_biases": NormsBiases,
    "mask_lora": partial(MaskLora, rank=3),
    "spp": partial(MaskLora, rank=4, variant="spp"),
    "hadamard": partial(MaskLora, rank=3, variant="hadamard"),
    "lora_then_mask": partial(MaskLora, rank=3, variant="lora_then_mask"),
}


def in_float64(window: Window, batch: Batch) -> Batch:
    window.double()
    calls = [call.to(torch.device("cpu"), {}) for call in batch.calls]
    for call in calls:
        for name, value in call.kwargs.items():
            if isinstance(value, tuple):  # cosines and sines
                call.kwargs[name] = tuple(one.double() for one in value)
    tensors = {name: getattr(batch, name).double() for name in ("inputs_BTD", "targets_BTD", "energies_BT")}
    return batch._replace(calls=calls, **tensors)


@pytest.mark.parametrize(("shape", "step", "tolerance"), [("gpt2", 1e-6, 1e-5), ("llama", 1e-3, 1e-2)])
@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_finite_differences(
    tokens_ST: Tensor, name: str, shape: str, step: float, tolerance: float
) -> None:
    """Llama computes its norms in float32, whatever its weights are."""
    data, window, masks = pruned_window(tiny_model(shape), tokens_ST)
    batch = in_float64(window, next(data.batches(0, 2)))
    made = MODULES[name](window, masks, data.unit(), loss=squared)
    generator = torch.Generator().manual_seed(2)
    with attached(made):
        trained = trained_by(made, window)
        for parameter in trained:
            parameter.requires_grad_(True)
            if name not in ("masked_weights", "norms_biases"):  # changes that are not zero
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        made.losses(batch).mean().backward()
        made.on_before_optimizer_step(None)
        way = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in trained]
        for matrix in window.matrices() if name == "masked_weights" else ():
            way[[id(one) for one in trained].index(id(matrix.weight))].mul_(masks[matrix.name])
        expected = sum((one.grad * along).sum() for one, along in zip(trained, way, strict=True))
        found = []
        with torch.no_grad():
            for sign in (1, -2):
                for one, along in zip(trained, way, strict=True):
                    one.add_(along, alpha=sign * step)
                found.append(made.losses(batch).mean())
    assert ((found[0] - found[1]) / 2 / step).item() == pytest.approx(expected.item(), rel=tolerance)


def squared(outputs_ND: Tensor, targets_ND: Tensor, *, energies_N: Tensor, unit: float) -> Tensor:
    return (outputs_ND - targets_ND).square().mean(-1) / unit


@pytest.mark.parametrize(
    ("make", "norms", "biases", "matrices"),
    [
        (module(), True, True, True),
        (module(train_norms=False), False, True, True),
        (module(train_biases=False), True, False, True),
        (module(cls=NormsBiases), True, True, False),
        (module(cls=NormsBiases, train_biases=False), True, False, False),
        (module(cls=MaskLora, rank=4, train_biases=False), True, False, True),
    ],
    ids=["all", "no norms", "no biases", "norms and biases", "norms", "low rank and norms"],
)
def test_only_what_is_asked_for_changes(
    tokens_ST: Tensor, tmp_path: Path, make: Callable, *, norms: bool, biases: bool, matrices: bool
) -> None:
    data, window, masks = pruned_window(tiny_model("gpt2"), tokens_ST)
    before = {id(one): one.detach().clone() for one in window.parameters()}
    assert fitter(tmp_path, make).fit(window, masks, data).accepted
    changed = {id(one): not torch.equal(one, before[id(one)]) for one in window.parameters()}
    found = vectors(window)
    assert [changed[id(one)] for one in found.norms] == [norms] * len(found.norms)
    assert [changed[id(one)] for one in found.biases] == [biases] * len(found.biases)
    assert [changed[id(one.weight)] for one in window.matrices()] == [matrices] * len(window.matrices())


def test_a_window_of_which_nothing_is_trained_keeps_its_pruned_weights_and_says_so(tokens_ST: Tensor) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before = weights(window)
    result = WindowFitter(Untrained, trainer(), device=CPU.device, seed=0).fit(window, masks, data)
    assert all(torch.equal(one, before[name]) for name, one in window.named_parameters())
    assert not result.accepted and result.steps == 0
    assert result.note == "nothing of it is trained: kept its pruned weights"
    assert result.held_out_before == result.held_out_after == data.errors(window, data.unit())[1].mean


def test_a_module_that_says_nothing_trains_all_of_its_window(tokens_ST: Tensor) -> None:
    _, window, _ = pruned_window(tiny_model("gpt2"), tokens_ST)
    silent = LightningModule()
    assert isinstance(attached(silent), nullcontext)
    for found in (trained_by(silent, window), changed_by(silent, window)):
        assert [id(one) for one in found] == [id(one) for one in window.parameters()]


class Measured(torch.optim.AdamW):
    """Counts the bytes of its states and of the gradients at its last step."""

    bytes: int

    def step(self, closure: Callable) -> object:
        loss = super().step(closure)
        parameters = [one for group in self.param_groups for one in group["params"]]
        tensors = [one.grad for one in parameters if one.grad is not None]
        tensors += [value for state in self.state.values() for value in state.values() if isinstance(value, Tensor)]
        type(self).bytes = sum(tensor.nbytes for tensor in tensors)
        return loss


def test_norms_and_low_rank_changes_take_less_memory_than_all_weights(tokens_ST: Tensor, tmp_path: Path) -> None:
    taken, all_weights = {}, 0
    for name, settings in (("all", {}), ("low rank", {"cls": MaskLora, "rank": 2}), ("norms", {"cls": NormsBiases})):
        data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
        made = type("Counted", (Measured,), {"bytes": 0})
        make = module(optimizer=partial(made, lr=1e-3), **settings)
        fitter(tmp_path, make, max_epochs=1).fit(window, masks, data)
        taken[name], all_weights = made.bytes, sum(one.nbytes for one in window.parameters())
        assert all(one.grad is None for one in window.parameters())
    assert taken["all"] >= 3 * all_weights, "gradients and two moments"
    assert taken["low rank"] < 0.4 * taken["all"] and taken["norms"] < 0.02 * taken["all"]
    assert 0 < taken["norms"] < taken["low rank"]


@pytest.mark.parametrize("name", ["masked_weights", "mask_lora", "norms_biases"])
def test_of_a_window_only_parameters_of_chosen_names_are_trained(tokens_ST: Tensor, tmp_path: Path, name: str) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    train = "(up|down)_proj|post_attention" if name != "norms_biases" else "post_attention"
    before = {key: one.detach().clone() for key, one in window.layers[0].named_parameters()}
    made = module(lr=1e-2, cls=MODULES[name], train=train)
    result = fitter(tmp_path, made).fit(window, masks, data)
    assert result.accepted
    changed = {key for key, one in window.layers[0].named_parameters() if not torch.equal(one, before[key])}
    matrices = {"mlp.down_proj.weight", "mlp.up_proj.weight"} if name != "norms_biases" else set()
    assert changed == {"post_attention_layernorm.weight"} | matrices


def test_what_is_no_expression_is_refused(tokens_ST: Tensor) -> None:
    _, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    with pytest.raises(ValueError, match=r"module\.train='\(': expected a regular expression for names of parameters"):
        MaskedWeights(window, masks, 1.0, train="(")
