"""Command lines drawn from all settings of conf/: each runs, or is refused in words that name a setting."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import telling_tokenizer, tiny_settings
from hydra import compose, initialize_config_dir
from launcher import Ended, Launcher
from odd_words import NONSENSE, NUMBERS, VALUES, ended_in_time, leaves, name_of, problem

from lit_recon.settings.conf import CONF, members

SEED = 20261128
GROUPS = tuple(sorted(path.name for path in CONF.iterdir() if path.is_dir()))
FETCHED = ("model", "data", "experiment")  # members of these ask the network
TEXT, MASKS, SPARSE = "TEXT", "MASKS", "SPARSE"  # stand for paths that only a test has
OWN_TEXT = ["data@data.evaluation=files", f"data.evaluation.paths=[{TEXT}]"]
BASES: list[list[str]] = [
    [],
    ["windows=blocks"],
    ["windows=half", "chain.inputs=mix"],
    ["windows=matrix", "module=least_squares"],
    ["windows=matrix"],
    ["pattern=n_m"],
    ["store=disk"],
    ["chain.statistics=sparse", "prune_by=block"],
    ["data=hub", "data.name=no/where", "data.num_samples=0"],  # refused before the Hub is asked
    ["walk=global"],
    ["walk=local_then_global"],
    ["criterion=sparsegpt"],
    ["criterion=ria"],
    ["criterion=file", f"criterion.masks={MASKS}"],
    ["criterion=zeros", f"criterion.name={SPARSE}"],
    ["module=mask_lora"],
    ["module=norms_biases"],
    ["data=self_generated", *OWN_TEXT],
    ["data=mixture", "data@data.sources.other=files", f"data.sources.other.paths=[{TEXT}]", *OWN_TEXT],
    ["optimizer=muon"],
    ["optimizer=adafactor"],
    ["allocation=owl", "refine=swaps"],
    ["allocation=error", "refine=dsnot", "loss=balanced"],
]
NEW = """
    trainer.callbacks trainer.overfit_batches trainer.strategy trainer.max_time trainer.plugins trainer.deterministic
    trainer.limit_train_batches trainer.limit_val_batches trainer.fast_dev_run trainer.profiler
    trainer.gradient_clip_algorithm
    trainer.min_epochs trainer.default_root_dir trainer.detect_anomaly trainer.barebones trainer.check_val_every_n_epoch
    trainer.num_nodes trainer.inference_mode module.optimizer.betas module.optimizer.eps module.scheduler.x windows.size
    criterion.x pattern.x store.x data.x model.x chain.x module.retry_rates.x nope a.b.c""".split()
ELSEWHERE = ("output_dir", "resume", "push", "trainer.default_root_dir", "trainer.profiler")  # what may write elsewhere
WALKED = 10  # one line in so many is not planned only, but run


def drawn_word(draw: random.Random, settings: list[str]) -> str:
    """One word."""
    kind, value = draw.random(), draw.choice(draw.choice((VALUES, VALUES, NUMBERS.split())))
    if kind < 0.06:
        return f"~{draw.choice(settings)}"
    if kind < 0.12:
        group = draw.choice(GROUPS)
        known = [] if group in FETCHED else members(group)
        return f"{group}={draw.choice(known) if known and draw.random() < 0.5 else value}"
    if kind < 0.25:
        return f"{draw.choice(('+', '++'))}{draw.choice(NEW)}={value}"
    if kind < 0.28:
        return draw.choice(NONSENSE)
    return f"{draw.choice(settings)}={value}"


def lines(count: int, seed: int = SEED) -> list[list[str]]:
    """Command lines, the same in every run; most of them end in plan=true."""
    draw = random.Random(seed)
    settings: list[list[str]] = []
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        for base in BASES:
            settings.append(sorted(set(leaves(compose("fit", overrides=["model=hf", "data=files", *base])))))
    made = []
    for number in range(count):
        index = draw.randrange(len(BASES))
        line = BASES[index] + [drawn_word(draw, settings[index]) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        walks = number % WALKED == 0 and not any(name_of(word) in ELSEWHERE for word in line)
        made.append(line if walks else [*line, "plan=true"])
    return made


def base_of(line: list[str], settings: list[str]) -> list[str]:
    """The settings of the tiny run that fit a line."""
    own = {word.partition("=")[0].lstrip("+") for word in line}
    without_paths = {"data=hub", "data=self_generated", "data=mixture"} & set(line)
    without_rate = {"module=least_squares", "module=none", "optimizer=none"} & set(line)
    return [
        word
        for word in settings
        if name_of(word) not in own
        and not (without_paths and word.startswith("data.paths"))
        and not (without_rate and word.startswith("module."))
    ]


def fuzz(launcher: Launcher, settings: list[str], some: list[list[str]], folder: Path) -> list[Any]:
    """The command lines that did not end as they should."""
    found: list[Any] = []
    for line in some:
        ended, stopped = ended_in_time(launcher, *base_of(line, settings), *line)
        run, walks = folder / "run", line[-1] != "plan=true"
        if stopped and walks and ended.status == 1:
            assert "interrupted" in ended.err, ended
        wrong = None
        if walks and ended.status in (0, 1):
            wrong = problem_of_run(launcher, run, ended)
            shutil.rmtree(run, ignore_errors=True)
        left = sorted(str(path) for path in folder.iterdir())
        wrong = wrong or problem(line, ended, left, allowed=(0, 1, 2) if walks else (0, 2))
        if wrong is not None:
            found.append((wrong, line, ended.err[-1500:]))
        for name in left:
            shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()
    return found


def problem_of_run(launcher: Launcher, run: Path, ended: Ended) -> str | None:
    """What is wrong with the folder of a run that has begun: finished, or resumed, or the reason why not."""
    finished = (run / "results.json").is_file()
    if finished or not run.exists():
        return None if ended.status == 0 else "failed, but has results or left nothing"
    again, stopped = ended_in_time(launcher, f"resume={run}")
    if stopped:
        return None
    return problem([f"resume={run}"], again, (), allowed=(0, 1, 2))


@pytest.fixture(scope="module")
def places(
    launcher: Launcher, model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What stands for paths: a text, and masks and checkpoint of a run."""
    run = tmp_path_factory.mktemp("pruned") / "run"
    line = ["module=none", f"output_dir={run}"]
    ended = launcher.run(*base_of(line, tiny_settings(model_folder, text_file)), *line)
    assert ended.status == 0, ended.err
    return {TEXT: str(text_file), MASKS: str(run / "masks.safetensors"), SPARSE: str(run / "checkpoint")}


def placed(word: str, places: dict[str, str]) -> str:
    """A word with its path."""
    for name, path in places.items():
        word = word.replace(name, path)
    return word


def test_lines_are_drawn_from_every_group_and_some_are_walked() -> None:
    some = lines(400)
    assert {group for group in GROUPS for line in some for word in line if name_of(word).startswith(group)} == {*GROUPS}
    assert 20 <= sum(line[-1] != "plan=true" for line in some) <= 40


@pytest.fixture(scope="module")
def telling_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer that names the start of a text, from which it can generate some."""
    folder = tmp_path_factory.mktemp("telling") / "model"
    shutil.copytree(model_folder, folder)
    telling_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("count", [25, pytest.param(1200, marks=pytest.mark.slow)])
def test_every_command_line_runs_or_is_refused_in_words_that_name_a_setting_and_leaves_nothing(
    count: int,
    launcher: Launcher,
    telling_folder: Path,
    text_file: Path,
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    some = [[placed(word, places) for word in line] for line in lines(count)]
    assert fuzz(launcher, tiny_settings(telling_folder, text_file), some, tmp_path) == []
