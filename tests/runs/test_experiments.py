"""Experiments: each case composes to what it says, and the command runs them all, each into its own folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lit_recon.fit.parts import CONF
from lit_recon.report.__main__ import main as report

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "matrix_least_squares": ({"by": "matrix"}, "LeastSquares"),
    "matrix_gradient": ({"by": "matrix"}, "MaskedWeights"),
    "half": ({"by": "half"}, "MaskedWeights"),
    "block": ({"by": "block"}, "MaskedWeights"),
    "blocks_4": ({"by": "blocks", "size": 4}, "MaskedWeights"),
    "model": ({"by": "model"}, "MaskedWeights"),
}
CRITERIA = {  # the members of two groups
    "magnitude": {"criterion": "magnitude"},
    "random": {"criterion": "random"},
    "wanda": {"criterion": "wanda"},
    "ria": {"criterion": "ria"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "wanda_swaps": {"criterion": "wanda", "refine": "swaps"},
}


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


@pytest.mark.parametrize("case", CRITERIA)
def test_a_case_of_criteria_is_its_criterion_and_differs_in_nothing_else(
    case: str, composed: Callable[..., DictConfig]
) -> None:
    own = {"output_dir", "experiment_dir", "hydra"}
    chosen = composed(*(f"{group}={member}" for group, member in CRITERIA[case].items()))
    expected = {key: value for key, value in chosen.items() if key not in own}
    cfg = composed("experiment=criteria", f"experiment/criteria={case}")
    assert {key: value for key, value in cfg.items() if key not in own} == expected
    assert ("refine" in cfg) == ("refine" in CRITERIA[case])
    assert cfg.output_dir == f"runs/criteria/smollm2_unstructured/{case}"


def test_criteria_of_other_models_and_patterns_have_other_folders(composed: Callable[..., DictConfig]) -> None:
    case = ["experiment=criteria", "experiment/criteria=ria"]
    assert composed(*case, "pattern=n_m").output_dir == "runs/criteria/smollm2_n_m/ria"
    assert composed(*case, "model=gemma3_270m").output_dir == "runs/criteria/gemma3_270m_unstructured/ria"


@pytest.mark.parametrize(("experiment", "cases"), [("granularity", CASES), ("criteria", CRITERIA)])
def test_the_sweeps_take_every_case(experiment: str, cases: dict, composed: Callable[..., DictConfig]) -> None:
    files = {path.stem for path in (CONF / "experiment" / experiment).glob("*.yaml")}
    taken = composed(f"experiment={experiment}").hydra.sweeper.params[f"experiment/{experiment}"].split(",")
    assert taken == list(cases) and files == set(cases), "in the order of the table, and none forgotten"


def test_settings_of_the_command_line_win_and_one_moves_all_folders(composed: Callable[..., DictConfig]) -> None:
    settings = ["data.num_samples=32", "windows.size=2", "experiment_dir=/data/sizes"]
    cfg = composed("experiment=granularity", "experiment/granularity=blocks_4", *settings)
    assert (cfg.data.num_samples, cfg.windows.size, cfg.output_dir) == (32, 2, "/data/sizes/blocks_4")


def test_an_experiment_is_a_sweep_also_without_the_flag_and_its_runs_are_a_study_of_the_report(
    tiny_run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = "output_dir=${experiment_dir}/${hydra:runtime.choices.experiment/criteria}"
    ended = tiny_run("experiment=criteria", "experiment/criteria=magnitude,wanda_swaps", folder)
    assert ended.status == 0, ended.err
    assert [path.name for path in Path().iterdir()] == ["runs"], "nothing but the folders of the runs"
    runs = [f"runs/criteria/hf_unstructured/{case}" for case in ("magnitude", "wanda_swaps")]
    assert sorted(path.as_posix() for path in Path("runs").glob("*/*/*")) == runs
    monkeypatch.setattr("lit_recon.report.page.write_report", lambda folder, out: None)
    report(["--markdown", *runs])
    said = capfd.readouterr().out
    for text in ("| magnitude | block, Magnitude |", "| wanda_swaps | block, Wanda + Swaps |", "criteria, 2 runs"):
        assert text in said, text
    assert Path("runs/criteria/hf_unstructured/criteria.png").is_file()
