"""Device and precision of a run: what is chosen, what is refused, which callbacks a Trainer gets."""

import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_recon.system.device import Compute


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


@pytest.mark.parametrize("given", [Counter(), [Counter()]], ids=["single", "list"])
def test_each_trainer_has_copies_of_the_callbacks_next_to_those_of_the_run(given: object) -> None:
    make = Compute(torch.device("cpu"), "32-true").trainers(partial(Trainer, logger=False, callbacks=given))
    mine = Callback()

    def callbacks() -> list[Callback]:
        return [found for found in make(callbacks=[mine]).callbacks if isinstance(found, Counter) or found is mine]

    first, second = callbacks(), callbacks()
    assert [type(callback) for callback in first] == [Counter, Callback]
    assert first[0] is not second[0] and first[1] is second[1] is mine
