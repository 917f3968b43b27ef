"""What would end the first window ends the rehearsal, which changes nothing of what the run draws or keeps."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EVERY_SHAPE, Ended, model_of
from torch import Tensor

from lit_recon.activations.store import StoreSettings
from lit_recon.fit.job import Execution, Method
from lit_recon.fit.library import TRAINER, _checked, _parts
from lit_recon.fit.rehearsal import rehearse
from lit_recon.model.partition import Partition
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import NM


def chosen(*, trainer: dict[str, Any] | None = None, **parts: Any) -> tuple[Method, Execution]:
    """The default method on the CPU, with other parts."""
    settings = TRAINER | {"accelerator": "cpu", "precision": "32-true"} | (trainer or {})
    return _checked(_parts() | parts, settings, StoreSettings(), 2, 0)


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_the_default_method_passes_on_every_layer_shape(shape: str) -> None:
    rehearse(model_of(shape), *chosen(), num_samples=8, num_held_out=2)


@pytest.mark.parametrize("windows", [Partition(by=by) for by in ("matrix", "half", "model")] + [Partition(head=True)])
def test_every_kind_of_windows_passes_also_with_padding(windows: Partition) -> None:
    rehearse(model_of("llama"), *chosen(windows=windows), num_samples=8, num_held_out=2, padded=True)


class Counting(Wanda):
    """A criterion that counts its calls and draws."""

    calls = 0

    def scores(self, weight_OI: Tensor, statistics: Tensor) -> Tensor:
        self.calls += 1
        return super().scores(weight_OI, statistics) + torch.rand(())


def test_it_draws_nothing_prints_nothing_leaves_nothing_and_parts_keep_their_state(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    criterion, before = Counting(), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    rehearse(model_of("llama"), *chosen(criterion=criterion), num_samples=8, num_held_out=2)
    assert criterion.calls == 0
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert capfd.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_what_depends_on_the_real_width_is_tried_in_it() -> None:
    rehearse(model_of("llama"), *chosen(pattern=NM(n=1, m=16)), num_samples=8, num_held_out=2)
    with pytest.raises(ValueError, match=r"pattern\.m=5"):
        rehearse(model_of("llama"), *chosen(pattern=NM(n=1, m=5)), num_samples=8, num_held_out=2)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"trainer": {"log_every_n_steps": 0}}, ZeroDivisionError),
        ({"trainer": {"val_check_interval": 0}}, ZeroDivisionError),
        ({"trainer": {"val_check_interval": 1000}}, ValueError),
        ({"module": partial(MaskedWeights, loss=lambda outputs, targets, energies_N, unit: "abc")}, Exception),
    ],
)
def test_what_ends_the_first_window_ends_it(settings: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        rehearse(model_of("llama"), *chosen(**settings), num_samples=8, num_held_out=2)


@pytest.mark.parametrize("chosen_windows", [Partition(skip=0.9), Partition(match="_02")], ids=["skip", "match"])
def test_windows_that_are_left_out_do_not_hide_what_ends_the_first_one(chosen_windows: Partition) -> None:
    bad = partial(MaskedWeights, loss=lambda outputs, targets, energies_N, unit: "abc")
    with pytest.raises(Exception, match="str"):
        rehearse(model_of("llama"), *chosen(windows=chosen_windows, module=bad), num_samples=8, num_held_out=2)
    rehearse(model_of("llama"), *chosen(windows=chosen_windows), num_samples=8, num_held_out=2)


def test_many_samples_are_not_gone_through() -> None:
    method, execution = chosen(trainer={"val_check_interval": 1000})
    rehearse(model_of("llama"), method, replace(execution, batch_size=2), num_samples=1 << 40, num_held_out=1 << 40)


LATE = {  # settings that would end the first window, and what is said of each
    ("criterion._target_=builtins.dict",): ["criterion._target_=builtins.dict", "Criterion"],
    ("~criterion._target_",): ["~criterion._target_", "custom, file, magnitude"],
    ("module.loss=abc",): ["module.loss=abc", "a function"],
    ("module.loss=null",): ["module.loss=null", "a function"],
    ("module.loss={_target_:torch.nn.MSELoss}",): ["module.loss={_target_:torch.nn.MSELoss}", "energies_N"],
    ("trainer.log_every_n_steps=0",): ["trainer.log_every_n_steps=0", "ZeroDivisionError"],
    ("trainer.val_check_interval=1e30",): ["trainer.val_check_interval=1e30", "training batches"],
    ("trainer.num_sanity_val_steps=abc",): ["trainer.num_sanity_val_steps=abc", "a whole number"],
    ("+trainer.callbacks=[1]",): ["trainer.callbacks=[1]", "Callback"],
    ("+trainer.overfit_batches=1",): ["trainer.overfit_batches=1"],
    ("data.batch_size=99999999999999999999",): ["data.batch_size=99999999999999999999"],
}


@pytest.mark.parametrize("overrides", LATE, ids=" ".join)
def test_a_setting_that_would_end_the_first_window_is_named_and_nothing_is_written(
    tiny_run: Callable[..., Ended], overrides: tuple[str, ...]
) -> None:
    ended = tiny_run(*overrides)
    assert ended.status == 2, ended
    assert all(said in ended.err for said in LATE[overrides]), ended.err
    assert "Traceback" not in ended.err and list(Path().iterdir()) == []
