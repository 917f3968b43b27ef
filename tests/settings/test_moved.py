"""What moved since an earlier version is refused with its new place, or goes on under its old name."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from lit_recon.settings.conf import CONF
from lit_recon.settings.moved import MOVED

SETTINGS = {  # by the part of the configuration that named it
    "ReconstructionModule": "module",
    "LeastSquaresModule": "module",
    "Wanda": "criterion",
    "Magnitude": "criterion",
    "Unstructured": "pattern",
    "NM": "pattern",
    "mean_squared": "loss",
    "mean_absolute": "loss",
    "HubModel": "model",
    "WheelModel": "model",
    "Partition": "windows",
    "Regime": "chain",
    "StoreSettings": "store",
}


def rounds() -> list[dict[str, str]]:
    """All paths from before, one for each setting at a time."""
    found: list[dict[str, str]] = []
    for old in MOVED:
        setting = f"{SETTINGS[old.rpartition('.')[2]]}._target_"
        free = next((each for each in found if setting not in each), None)
        if free is None:
            found.append(free := {})
        free[setting] = old
    return found


@pytest.mark.parametrize("paths", rounds(), ids=lambda paths: f"{len(paths)} paths")
def test_paths_from_before_are_refused_with_the_new_ones(paths: dict[str, str], tiny_run: Callable[..., Ended]) -> None:
    ended = tiny_run(*(f"{setting}={old}" for setting, old in paths.items()))
    assert ended.status == 2
    for setting, old in paths.items():
        assert f"{setting}={old} has moved; use {MOVED[old]}." in ended.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("from lit_recon.modules.reconstruction import ReconstructionModule", "modules.masked_weights now"),
        ("from lit_recon.criteria.wanda import Wanda", "lit_recon.criteria is lit_recon.pruning.criteria now"),
        ("from lit_recon.activations import Batch", "lit_recon.activations is lit_recon.activations.datamodule now"),
    ],
)
def test_a_file_of_ones_own_that_imports_from_an_old_place_is_refused_with_the_new_one(
    tiny_run: Callable[..., Ended], line: str, said: str
) -> None:
    Path("mine.py").write_text(line + "\n\n\nclass Mine: ...\n")
    ended = tiny_run("module=custom", "module._target_=mine.Mine")
    assert ended.status == 2 and said in ended.err and "Expected <file>.<class>" in ended.err


@pytest.mark.parametrize("new", [path for path in MOVED.values() if path.startswith("lit_recon.")])
def test_what_has_moved_is_at_its_new_path(new: str) -> None:
    assert get_object(new).__name__ == new.rpartition(".")[2]


def test_the_module_can_be_chosen_by_its_name_from_before() -> None:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        before, now = (compose("fit", overrides=[f"module={name}"]) for name in ("reconstruction", "masked_weights"))
    assert now.module.optimizer.lr == "probe"
    assert OmegaConf.to_container(before) == OmegaConf.to_container(now)
