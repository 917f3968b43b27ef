"""Device and precision of a run: what is chosen, what is refused, which callbacks a Trainer gets."""

import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_recon.system.device import Compute, ResidentStrategy, cpu_name, one_process


class Counter(Callback):
    """Counts its fits."""

    fits = 0

    def on_fit_start(self, *given: object) -> None:
        self.fits += 1


def on_a_mac(accelerator: str, **settings: object) -> SimpleNamespace:
    """What a Trainer chooses on a machine with Apple's GPU."""
    strategy = SingleDeviceStrategy(device=torch.device("cpu" if accelerator == "cpu" else "mps"))
    return SimpleNamespace(strategy=strategy)


def test_a_device_without_float64_is_not_chosen_and_refused_where_it_is_asked_for() -> None:
    chosen = Compute.choose(partial(on_a_mac, accelerator="auto"), "32-true")
    assert chosen.device.type == "cpu"
    with pytest.raises(ValueError, match=r"no float64.*trainer\.accelerator=cpu"):
        Compute.choose(partial(on_a_mac, accelerator="gpu"), "32-true")


@pytest.mark.parametrize("thing", [threading.Lock(), torch.ones(1, requires_grad=True) * 2], ids=["lock", "tensor"])
def test_a_callback_that_cannot_be_copied_is_refused(thing: object) -> None:
    held = Counter()
    held.thing = thing
    with pytest.raises(ValueError, match=r"trainer\.callbacks: each window gets a copy"):
        Compute(torch.device("cpu"), "32-true").trainers(partial(Trainer, callbacks=held))


def test_callbacks_that_write_lightnings_checkpoints_are_refused_before_any_work() -> None:
    class Mine(ModelCheckpoint):
        pass

    for given in (Mine(), [Counter(), Mine()]):
        with pytest.raises(
            ValueError, match=r"^of its callbacks, Mine writes checkpoints of Lightning.*leave it out\.$"
        ):
            Compute(torch.device("cpu"), "32-true").trainers(partial(Trainer, callbacks=given))


@pytest.mark.parametrize("given", [Counter(), [Counter()]], ids=["single", "list"])
def test_each_trainer_has_copies_of_the_callbacks_next_to_those_of_the_run(given: object) -> None:
    make = Compute(torch.device("cpu"), "32-true").trainers(partial(Trainer, logger=False, callbacks=given))
    mine = Callback()

    def callbacks() -> list[Callback]:
        return [found for found in make(callbacks=[mine]).callbacks if isinstance(found, Counter) or found is mine]

    first, second = callbacks(), callbacks()
    assert [type(callback) for callback in first] == [Counter, Callback]
    assert first[0] is not second[0] and first[1] is second[1] is mine


class Saves(Callback):
    """Writes a checkpoint, as some of Lightning's callbacks do for a moment."""

    def on_train_end(self, trainer: Trainer, pl_module: object) -> None:
        trainer.save_checkpoint("mine.ckpt")


def test_a_trainer_writes_no_pickle_also_if_a_callback_wants_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compute = Compute(torch.device("cpu"), "32-true")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    make = compute.trainers(partial(Trainer, logger=False, max_steps=1, callbacks=Saves(), **quiet))
    with pytest.raises(ValueError, match=r"writes mine\.ckpt, a pickle; a run writes none: leave it out"):
        make(callbacks=[]).fit(BoringModel())
    assert not list(tmp_path.iterdir())


class Stays(BoringModel):
    """May not be moved to the CPU; remembers its optimizer's state."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.made = torch.optim.Adam(self.parameters())
        return self.made

    def cpu(self) -> "Stays":
        raise AssertionError("moved to the CPU")


def test_the_end_of_a_fit_moves_neither_weights_nor_the_optimizers_state(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[object] = []
    monkeypatch.setattr(
        "lightning.pytorch.strategies.strategy._optimizers_to_device", lambda optimizers, to: moved.append(to)
    )
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    make = Compute(torch.device("cpu"), "32-true").trainers(partial(Trainer, logger=False, max_steps=2, **quiet))
    model = Stays()
    make(callbacks=[]).fit(model)
    assert all(model.made.state[one]["step"] == 2 for one in model.parameters())
    assert moved.count(torch.device("cpu")) == 1, "to where the fit is, and nowhere else"
    with pytest.raises(AssertionError, match="moved to the CPU"):
        make(callbacks=[], strategy=SingleDeviceStrategy(torch.device("cpu"))).fit(Stays())


def test_each_trainer_has_a_strategy_of_its_own_unless_the_user_gives_one() -> None:
    make = Compute(torch.device("cpu"), "32-true").trainers(partial(Trainer, logger=False, strategy="auto"))
    first, second = make(callbacks=[]), make(callbacks=[])
    assert type(first.strategy) is ResidentStrategy and first.strategy is not second.strategy
    assert first.strategy.root_device == torch.device("cpu") and first.precision == "32-true"
    theirs = Compute(torch.device("cpu"), "32-true").trainers(partial(Trainer, logger=False, strategy="ddp", devices=1))
    assert type(theirs(callbacks=[]).strategy).__name__ == "DDPStrategy"


@pytest.mark.parametrize("plugins", [MixedPrecision("bf16-mixed", "cpu"), [MixedPrecision("bf16-mixed", "cpu")], None])
def test_a_trainer_keeps_plugins_of_the_users_own_and_is_one_process(
    monkeypatch: pytest.MonkeyPatch, plugins: object
) -> None:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "x"}.items():
        monkeypatch.setenv(name, value)
    made = one_process(partial(Trainer, logger=False, plugins=plugins, accelerator="cpu", devices=1))()
    assert type(made.strategy) is SingleDeviceStrategy and made.world_size == 1 and made.global_rank == 0
    assert isinstance(made.precision_plugin, MixedPrecision) == (plugins is not None)


@pytest.mark.parametrize(
    ("about", "name"),
    [
        ("processor : 0\nmodel name\t: A CPU: 2 GHz\n\nmodel name : another\n", "A CPU: 2 GHz"),
        ("", "arm"),
        (None, "arm"),
    ],
)
def test_the_name_of_the_cpu_is_the_systems_or_its_architecture(
    about: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **_: object) -> str:
        if about is None:
            raise OSError("no such file")
        return about

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr("platform.processor", lambda: "arm")
    assert cpu_name() == name
