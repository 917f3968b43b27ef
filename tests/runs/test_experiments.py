"""Experiments: each case composes to what it says, and the command runs them all, each into its own folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lit_recon.fit.parts import CONF

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "matrix_least_squares": ({"by": "matrix"}, "LeastSquares"),
    "matrix_gradient": ({"by": "matrix"}, "MaskedWeights"),
    "half": ({"by": "half"}, "MaskedWeights"),
    "block": ({"by": "block"}, "MaskedWeights"),
    "blocks_4": ({"by": "blocks", "size": 4}, "MaskedWeights"),
    "model": ({"by": "model"}, "MaskedWeights"),
}
CRITERIA = sorted(path.stem for path in (CONF / "criterion").glob("*.yaml") if path.stem != "custom")


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., DictConfig]:
    """The configuration of one run, with Hydra's own part, as inside a run."""

    def compose_run(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            cfg = compose("fit", overrides=list(overrides), return_hydra_config=True)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # is set back after the test
        HydraConfig.instance().set_config(cfg)
        return cfg

    return compose_run


@pytest.mark.parametrize("case", CASES)
def test_a_case_of_granularity_is_its_windows_and_module_on_128_samples(
    case: str, composed: Callable[..., DictConfig]
) -> None:
    windows, module = CASES[case]
    cfg = composed("experiment=granularity", f"experiment/granularity={case}")
    assert {key: cfg.windows[key] for key in windows} == windows
    assert ("size" in cfg.windows) == ("size" in windows)
    assert cfg.module._target_.rpartition(".")[2] == module
    assert cfg.output_dir == f"runs/granularity/{case}"
    assert cfg.data.num_samples == 128


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_case_of_criterion_is_its_criterion_on_the_default_data(
    criterion: str, composed: Callable[..., DictConfig]
) -> None:
    default = composed(f"criterion={criterion}")
    cfg = composed("experiment=criterion", f"criterion={criterion}")
    assert (cfg.criterion, cfg.data, cfg.windows) == (default.criterion, default.data, default.windows)
    assert cfg.output_dir == f"runs/criterion/{criterion}"


def test_the_sweeps_take_every_case(composed: Callable[..., DictConfig]) -> None:
    files = {path.stem for path in (CONF / "experiment" / "granularity").glob("*.yaml")}
    cases = composed("experiment=granularity").hydra.sweeper.params["experiment/granularity"].split(",")
    assert cases == list(CASES) and files == set(CASES), "from the smallest window to the largest, and none forgotten"
    criteria = composed("experiment=criterion").hydra.sweeper.params.criterion
    assert sorted(criteria.split(",")) == CRITERIA


def test_settings_of_the_command_line_win_and_one_moves_all_folders(composed: Callable[..., DictConfig]) -> None:
    settings = ["data.num_samples=32", "windows.size=2", "experiment_dir=/data/sizes"]
    cfg = composed("experiment=granularity", "experiment/granularity=blocks_4", *settings)
    assert (cfg.data.num_samples, cfg.windows.size, cfg.output_dir) == (32, 2, "/data/sizes/blocks_4")


def test_an_experiment_is_a_sweep_also_without_the_flag_and_leaves_only_the_folders_of_its_runs(
    tiny_run: Callable[..., Ended],
) -> None:
    ended = tiny_run("experiment=criterion", "output_dir=${experiment_dir}/${hydra:runtime.choices.criterion}")
    assert ended.status == 0, ended.err
    assert [path.name for path in Path().iterdir()] == ["runs"]
    assert sorted(path.relative_to("runs").as_posix() for path in Path("runs").glob("*/*")) == [
        f"criterion/{criterion}" for criterion in CRITERIA
    ]
    for criterion in CRITERIA:
        results = json.loads(Path(f"runs/criterion/{criterion}/results.json").read_text())
        assert results["recipe"]["criterion"].lower() == criterion
