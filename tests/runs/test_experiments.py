"""Experiments: each case composes to what it says, and the command runs them all, each into its own folder."""

import re
from collections.abc import Callable, Collection
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, letter_tokenizer
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lit_recon.model.architectures import tiny_model
from lit_recon.report.__main__ import main as report
from lit_recon.settings.conf import CONF

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "matrix_least_squares": ({"by": "matrix"}, "LeastSquares"),
    "matrix_gradient": ({"by": "matrix"}, "MaskedWeights"),
    "half": ({"by": "half"}, "MaskedWeights"),
    "block": ({"by": "block"}, "MaskedWeights"),
    "blocks_4": ({"by": "blocks", "size": 4}, "MaskedWeights"),
    "blocks_8": ({"by": "blocks", "size": 8}, "MaskedWeights"),
    "blocks_8_stride_4": ({"by": "blocks", "size": 8, "stride": 4}, "MaskedWeights"),
    "model": ({"by": "model"}, "MaskedWeights"),
    "matrix_k_up": ({"by": "matrix", "match": "k_proj|up_proj"}, "MaskedWeights"),
    "block_k_up": ({"by": "block"}, "MaskedWeights"),
}
RETRAINING = {  # walk, loss and module
    "local": ("local", "huber", "MaskedWeights"),
    "global_kl": ("global", "kl_divergence", "MaskedWeights"),
    "global_ce": ("global", "cross_entropy", "MaskedWeights"),
    "mask_lora_kl": ("global", "kl_divergence", "MaskLora"),
    "mask_lora_ce": ("global", "cross_entropy", "MaskLora"),
}
CRITERIA = {  # the members of two groups
    "magnitude": {"criterion": "magnitude"},
    "random": {"criterion": "random"},
    "wanda": {"criterion": "wanda"},
    "ria": {"criterion": "ria"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "wanda_swaps": {"criterion": "wanda", "refine": "swaps"},
}
README = (CONF.parent / "README.md").read_text(encoding="utf-8")
REGIMES = [  # of the README's table: each row is all combinations of what its first three cells name
    regime
    for row in re.findall(r"^\| ((?:dense|sparse|mix)[^|]*) \| ([^|]+) \| ([^|]+) \| [2-5]", README, re.MULTILINE)
    for regime in product(*(cell.split(", ") for cell in row))
]
PAPER = {  # tiny models of the same architecture, and the context in which the paper has the large one
    "llama2_7b": ("llama", 4096),
    "llama3_1_8b": ("llama", 4096),
    "llama3_2_1b": ("llama", 4096),
    "qwen2_5_7b": ("qwen2", 4096),
    "opt_125m": ("opt", 2048),
    "opt_6_7b": ("opt", 2048),
}
RATES = [1e-7, 5e-7, 1e-6, 5e-6, 1e-5, 5e-5, 1e-4, 5e-4]


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
    assert cfg.module.get("train") == ("k_proj|up_proj" if case == "block_k_up" else None)
    assert cfg.output_dir == f"runs/granularity/1_epochs/{case}"
    assert cfg.data.num_samples == 128


def test_windows_are_compared_at_three_numbers_of_steps_the_fewest_first(composed: Callable[..., DictConfig]) -> None:
    params = composed("experiment=granularity").hydra.sweeper.params
    assert list(params) == ["trainer.max_epochs", "experiment/granularity"] and params["trainer.max_epochs"] == "1,4,16"
    cfg = composed("experiment=granularity", "experiment/granularity=half", "trainer.max_epochs=16")
    assert cfg.output_dir == "runs/granularity/16_epochs/half"


@pytest.mark.parametrize("case", RETRAINING)
def test_a_case_of_retraining_is_its_walk_loss_and_module(case: str, composed: Callable[..., DictConfig]) -> None:
    cfg = composed("experiment=retraining", f"experiment/retraining={case}", "data.num_samples=512", "pattern=n_m")
    found = cfg.walk, cfg.loss._target_.rpartition(".")[2], cfg.module._target_.rpartition(".")[2]
    assert found == RETRAINING[case]
    assert case == "local" or cfg.retraining.loss == cfg.loss
    assert cfg.data._target_.endswith(".SelfGenerated") and cfg.retraining.rate == 0.1
    assert cfg.output_dir == f"runs/retraining/smollm2_n_m_self_generated/512x256/{case}"


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


def test_the_cases_of_regimes_are_the_rows_of_the_readme_that_are_not_refused(
    composed: Callable[..., DictConfig],
) -> None:
    assert len(REGIMES) == 10 and ("sparse", "dense", "dense") in REGIMES
    for regime in REGIMES:
        own = OmegaConf.load(CONF / "experiment" / "regimes" / f"{'_'.join(regime)}.yaml")
        assert own == {"chain": dict(zip(("inputs", "targets", "statistics"), regime, strict=True))}
    cfg = composed("experiment=regimes", "experiment/regimes=mix_local_sparse", "windows=half")
    assert (cfg.chain.inputs, cfg.chain.targets, cfg.chain.statistics, cfg.chain.mix) == ("mix", "local", "sparse", 0.5)
    assert cfg.output_dir == "runs/regimes/smollm2_half/mix_local_sparse"


@pytest.mark.parametrize(
    ("experiment", "varied", "folders"),
    [
        ("sparsity", {"sparsity": [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]}, "runs/sparsity/smollm2/{0}"),
        ("skip", {"windows.skip": [0.0, 0.1, 0.25, 0.5, 0.75]}, "runs/skip/smollm2_block/{0}"),
        ("seeds", {"seed": [0, 1, 2, 3, 4]}, "runs/seeds/smollm2/seed_{0}"),
        ("rates", {"module.optimizer.lr": [1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 1e-2]}, "runs/rates/smollm2_block/{0}"),
        (
            "data",
            {"data": ["python_docs", "self_generated", "mixture"], "data.num_samples": [8, 32, 128]},
            "runs/data/smollm2/{0}_{1}x256",
        ),
        (
            "paper/llama3_1_8b",
            {"module.optimizer.lr": RATES, "trainer.max_epochs": [1, 5, 10]},
            "runs/paper/llama3_1_8b_c4_n_m/rate_{0}_epochs_{1}",
        ),
    ],
)
def test_a_sweep_over_values_varies_those_and_has_a_folder_for_each(
    experiment: str, varied: dict[str, list], folders: str, composed: Callable[..., DictConfig]
) -> None:
    params = composed(f"experiment={experiment}").hydra.sweeper.params
    read = {key: [type(values[0])(word) for word in params[key].split(",")] for key, values in varied.items()}
    assert read == varied and set(params) == set(varied)
    last = [values[-1] for values in varied.values()]
    words = [f"{key}={value}" for key, value in zip(varied, last, strict=True)]
    assert composed(f"experiment={experiment}", *words).output_dir == folders.format(*last)


def test_the_sources_of_the_data_study_are_measured_alike_also_those_of_the_hub(
    composed: Callable[..., DictConfig],
) -> None:
    for source in ("mixture", "c4"):
        cfg = composed("experiment=data", f"data={source}", "data.num_samples=8")
        data = cfg.data
        assert (data.num_samples, data.length, data.evaluation_samples, data.evaluation_length) == (8, 256, 16, 512)


def test_the_best_quality_is_one_run_of_refined_masks_blocks_and_all_layers_on_other_samples(
    composed: Callable[..., DictConfig],
) -> None:
    cfg = composed("experiment=best_quality")
    assert cfg.hydra.mode is None and not cfg.hydra.sweeper.params, "a run, no sweep"
    assert (cfg.walk, cfg.windows.by, cfg.data.num_samples, cfg.data.num_retraining) == (
        *("local_then_global", "block"),
        *(128, 64),
    )
    assert cfg.refine._target_.endswith(".Swaps") and cfg.criterion._target_.endswith(".Wanda")
    assert cfg.retraining.loss._target_.endswith(".kl_divergence")


def test_rates_are_compared_without_a_second_try_at_another_rate(composed: Callable[..., DictConfig]) -> None:
    assert composed("experiment=rates").module.retry_rates == []


@pytest.mark.parametrize("member", PAPER)
def test_the_papers_settings_are_those_of_its_published_sweep(member: str, composed: Callable[..., DictConfig]) -> None:
    cfg = composed(f"experiment=paper/{member}")
    length = PAPER[member][1]
    assert (cfg.data.num_samples, cfg.data.length, cfg.data.evaluation_length) == (1024, length, length)
    assert (cfg.data.name, cfg.data.evaluation.name, cfg.data.batch_size) == ("allenai/c4", "Salesforce/wikitext", 2)
    assert cfg.data.evaluation_samples is None
    assert (cfg.pattern.n, cfg.pattern.m, cfg.windows.by) == (2, 4, "half")
    assert cfg.criterion._target_.endswith(".Wanda") and cfg.loss._target_.endswith(".mean_squared")
    assert (cfg.chain.inputs, cfg.chain.targets, cfg.chain.statistics) == ("dense", "dense", "dense")
    assert cfg.module.optimizer._target_ == "torch.optim.AdamW" and cfg.module.optimizer.weight_decay == 0
    assert cfg.module.scheduler._target_.endswith(".linear_with_warmup") and cfg.module.warmup == 0.1
    assert cfg.seed == 1 and cfg.module.retry_rates == []


@pytest.mark.parametrize(
    ("source", "name"), [("minipile", "JeanKaddour/minipile"), ("wikitext2", "Salesforce/wikitext")]
)
def test_the_papers_other_text_and_pattern_are_words_of_the_command_line(
    source: str, name: str, composed: Callable[..., DictConfig]
) -> None:
    cfg = composed("experiment=paper/opt_125m", f"data={source}", "pattern=unstructured")
    assert (cfg.data.name, cfg.data.num_samples, cfg.data.length) == (name, 1024, 2048)
    assert (cfg.data.evaluation.name, cfg.data.evaluation.split) == ("Salesforce/wikitext", "test")
    assert cfg.output_dir == f"runs/paper/opt_125m_{source}_unstructured/rate_1e-05_epochs_1"


def test_every_member_of_paper_is_tested() -> None:
    assert {path.stem for path in (CONF / "experiment" / "paper").glob("*.yaml")} == set(PAPER)


@pytest.mark.parametrize(
    "member",
    [
        pytest.param(one, marks=() if one in ("llama3_1_8b", "qwen2_5_7b", "opt_125m") else pytest.mark.slow)
        for one in PAPER
    ],
)
def test_the_papers_settings_can_be_planned_without_network_on_a_tiny_model(
    member: str, tiny_run: Callable[..., Ended], tmp_path: Path
) -> None:
    folder = tmp_path / "dense"
    tiny_model(PAPER[member][0]).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    words = [f"model.name={folder}", "hydra.mode=RUN", "plan=true"]  # and data=files data.paths=...
    ended = tiny_run(f"experiment=paper/{member}", *words)
    assert ended.status == 0, ended.err
    assert "2:4 (keep 2 of every 4) by Wanda" in ended.out and "(half), 4 steps each" in ended.out
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("experiment", "cases"),
    [
        ("granularity", CASES),
        ("criteria", CRITERIA),
        ("regimes", ["_".join(regime) for regime in REGIMES]),
        ("retraining", RETRAINING),
    ],
)
def test_the_sweeps_take_every_case(
    experiment: str, cases: Collection[str], composed: Callable[..., DictConfig]
) -> None:
    files = {path.stem for path in (CONF / "experiment" / experiment).glob("*.yaml")}
    taken = composed(f"experiment={experiment}").hydra.sweeper.params[f"experiment/{experiment}"].split(",")
    assert taken == list(cases) and files == set(cases), "in the order of the table, and none forgotten"


def test_settings_of_the_command_line_win_and_one_moves_all_folders(composed: Callable[..., DictConfig]) -> None:
    settings = ["data.num_samples=32", "windows.size=2", "experiment_dir=/data/sizes"]
    cfg = composed("experiment=granularity", "experiment/granularity=blocks_4", *settings)
    assert (cfg.data.num_samples, cfg.windows.size, cfg.output_dir) == (32, 2, "/data/sizes/1_epochs/blocks_4")


def test_an_experiment_is_a_sweep_also_without_the_flag_and_its_runs_are_a_study_of_the_report(
    tiny_run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = "output_dir=${experiment_dir}/${hydra:runtime.choices.experiment/criteria}"
    words = ["experiment=criteria", "experiment/criteria=magnitude,wanda_swaps", folder]
    ended = tiny_run(*words)
    assert ended.status == 0, ended.err
    assert "2 runs: 2 to be started\nabout " in ended.out and "1 of 2 runs ended; about " in ended.out
    assert [path.name for path in Path().iterdir()] == ["runs"], "nothing but the folders of the runs"
    runs = [f"runs/criteria/hf_unstructured/{case}" for case in ("magnitude", "wanda_swaps")]
    assert sorted(path.parent.as_posix() for path in Path("runs").rglob("results.json")) == runs
    assert Path("runs/criteria/hf_unstructured/report/report.html").is_file()
    monkeypatch.setattr("lit_recon.report.page.write_report", lambda folder, out: None)
    again = tiny_run(*words)
    assert again.status == 0 and "2 runs: 2 done\n" in again.out and "spread between criteria, 2 runs" in again.out
    assert "predicted" not in again.out, "nothing is run again"
    report(["--markdown", *runs])
    said = capfd.readouterr().out
    for text in ("| magnitude | block, Magnitude |", "| wanda_swaps | block, Wanda + Swaps |", "criteria, 2 runs"):
        assert text in said, text
    assert Path("runs/criteria/hf_unstructured/criteria.png").is_file()
