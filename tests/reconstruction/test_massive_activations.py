"""A token with a massive activation neither slows the fit of the others nor decides alone whether it is accepted."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import fitter, module, pruned_window, weights
from lightning import LightningModule
from torch import Tensor

from lit_recon.activations.datamodule import Activations, Batch
from lit_recon.model.architectures import tiny_model
from lit_recon.model.errors import Errors
from lit_recon.model.windows import Window
from lit_recon.reconstruction.held_out_errors import HeldOutErrors

SINK = 5  # a token at one position of every sample


def left_of_others(run: Path, scale: float, make: Callable[..., LightningModule]) -> float:
    """Share of the error that a fit leaves of tokens other than SINK, of which one feature is scaled."""
    tokens_ST = torch.randint(6, 64, (36, 24), generator=torch.Generator().manual_seed(1))
    tokens_ST[:, 3] = SINK
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[SINK, 7] = scale * model.model.embed_tokens.weight.std()
    data, window, masks = pruned_window(model, tokens_ST, num_samples=32)

    def error() -> float:
        outputs_STD = window(data.inputs_STD[32:], data.batching.calls(torch.arange(32, 36)))
        return (outputs_STD - data.targets_STD[32:])[tokens_ST[32:] != SINK].square().mean().item()

    before = error()
    fitter(run, partial(make, data), max_epochs=1).fit(window, masks, data)
    return error() / before


def as_configured(data: Activations, *arguments: object) -> LightningModule:
    """The default module, in the default unit."""
    return module()(*arguments)


def in_units_of_variance(
    data: Activations, window: Window, masks: Mapping[str, Tensor], unit: float
) -> LightningModule:
    """Its loss over the variance of the targets, and AdamW as PyTorch has it."""
    variance = data.targets_STD[: data.batching.num_samples].flatten(0, 1).var(0).mean().item()
    return module(optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0))(window, masks, variance)


def test_tokens_beside_a_massive_activation_are_won_back_as_without_it(tmp_path: Path) -> None:
    usual = left_of_others(tmp_path / "usual", 1.0, as_configured)
    assert usual < 0.9, "there is something to win"
    for scale in (1e4, 1e6):  # the second, since gradients of a tiny model are a hundred times larger
        found = left_of_others(tmp_path / f"{scale}", scale, as_configured)
        assert found == pytest.approx(usual, abs=0.1 * (1 - usual))
    slow = left_of_others(tmp_path / "variance", 1e6, in_units_of_variance)
    assert 1 - slow < 0.5 * (1 - usual), "in units of the variance, most gradients are below AdamW's eps"


class Moving(LightningModule):
    """A module that moves its window's norms alone."""

    def __init__(self, window: Window, masks: Mapping[str, Tensor], unit: float) -> None:
        super().__init__()
        self.window = window

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.window(batch.inputs_BTD, batch.calls).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([one for one in self.parameters() if one.dim() == 1], lr=1e-3)


@pytest.mark.parametrize(
    ("after", "accepted"),
    [
        (Errors(0.4, 0.2), True),
        (Errors(0.1, 0.31), False),  # one massive activation got better, all the others worse
        (Errors(0.51, 0.1), False),  # the other way round
        (Errors(0.5, 0.2), False),
        (Errors(0.4, 0.3), False),
    ],
    ids=str,
)
def test_a_window_is_accepted_if_its_mean_and_its_typical_token_improve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: Errors, accepted: bool
) -> None:
    tokens_ST = torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(1))
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before, pruned = Errors(0.5, 0.3), weights(window)
    found = iter([before, after, after, after])
    monkeypatch.setattr(HeldOutErrors, "now", lambda _: next(found))
    result = fitter(tmp_path, Moving, max_epochs=1).fit(window, masks, data)
    kept = after if accepted else before
    assert result.accepted == accepted
    assert (result.held_out_after, result.typical_after) == kept
    same = all(torch.equal(parameter, pruned[name]) for name, parameter in window.named_parameters())
    assert same != accepted, "the pruned weights, or those that were trained"
    assert result.tries == [[rate, *after] for rate in ((1,) if accepted else (1, 1 / 4, 1 / 16))]
