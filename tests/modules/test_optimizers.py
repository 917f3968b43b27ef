"""Every optimizer of conf/optimizer trains a window and leaves its zeros, with accumulation, clipping and decay."""

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import configuration, fitter, module, pruned_window, weights
from hydra.utils import instantiate
from torch import Tensor

from lit_recon.model.architectures import tiny_model
from lit_recon.modules import optimizers
from lit_recon.modules.optimizers import Muon
from lit_recon.modules.rates import make_optimizer
from lit_recon.reconstruction.trainer_callbacks import scale_rates
from lit_recon.settings.conf import CONF

NAMES = sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml") if path.stem != "none")


def chosen(name: str, **settings: object) -> partial:
    """The optimizer of a member of the group."""
    made = instantiate(configuration(f"optimizer={name}").module.optimizer, _convert_="all")
    return partial(made, **settings)


@pytest.mark.parametrize("kind", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_a_window_learns_and_its_pruned_weights_stay_exactly_zero(
    tokens_ST: Tensor, tmp_path: Path, name: str, kind: str
) -> None:
    data, window, masks = pruned_window(tiny_model(kind), tokens_ST)
    before = weights(window)
    rate = {} if name == "sgd" else {"lr": 1e-2}
    make = module(optimizer=chosen(name, weight_decay=0.1, **rate))
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    result = fitter(tmp_path, make, **settings).fit(window, masks, data)
    assert result.accepted and result.steps == 4, result
    for matrix in window.matrices():
        assert torch.count_nonzero(matrix.weight[~masks[matrix.name]]) == 0, matrix.name
    for one, parameter in window.named_parameters():
        assert not torch.equal(parameter, before[one]), one


def test_the_rates_and_the_memory_of_muon_are_those_of_one_optimizer() -> None:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (4,), (2, 4, 6))]
    optimizer = make_optimizer(chosen("muon", lr=1e-2), parameters)
    assert isinstance(optimizer, Muon) and len(optimizer.param_groups) == 3
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    assert all(not torch.equal(*pair) for pair in zip(before, parameters, strict=True))
    assert len(optimizer.state) == 3, "a memory of each"
    optimizer.state.clear()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters)
    trainer = type("Trainer", (), {"optimizers": [optimizer], "lr_scheduler_configs": []})
    scale_rates(trainer, 0.0)  # type: ignore[arg-type]
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, parameters, strict=True)), "at rate zero none moves"


def test_weight_decay_pulls_matrices_and_not_norms_at_rate_times_decay(tokens_ST: Tensor, tmp_path: Path) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    before, after = weights(window), []
    for decay in (0.0, 0.5):
        for name, parameter in window.named_parameters():
            parameter.data.copy_(before[name])
        make = module(optimizer=chosen("adamw", lr=1e-2, weight_decay=decay), scheduler=None)
        fitter(tmp_path, make, max_epochs=-1, max_steps=1).fit(window, masks, data)
        after.append(weights(window))
    for name, start in before.items():
        pull = 1e-2 * 0.5 * start if start.dim() > 1 else torch.zeros_like(start)
        torch.testing.assert_close(after[0][name] - after[1][name], pull, rtol=1e-3, atol=1e-6)


def test_muon_is_refused_where_torch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(optimizers.torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"optimizer=muon needs torch 2\.9 or newer, and .* is installed"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))])
