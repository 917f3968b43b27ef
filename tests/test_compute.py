"""Where a run computes: what hardware is taken, and what is refused."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_recon.compute import Compute


def on_a_mac(accelerator: str, **settings: object) -> SimpleNamespace:
    """What a Trainer chooses on a machine with Apple's GPU."""
    strategy = SingleDeviceStrategy(device=torch.device("cpu" if accelerator == "cpu" else "mps"))
    return SimpleNamespace(strategy=strategy)


def test_a_device_without_float64_is_not_chosen_and_refused_where_it_is_asked_for() -> None:
    chosen = Compute.choose(partial(on_a_mac, accelerator="auto"), "32-true")
    assert chosen.device.type == "cpu"
    with pytest.raises(ValueError, match=r"no float64.*trainer\.accelerator=cpu"):
        Compute.choose(partial(on_a_mac, accelerator="gpu"), "32-true")
