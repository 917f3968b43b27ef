"""Command lines drawn from all settings of conf/: each runs, or is refused in words that name a setting."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, tiny_settings
from hydra import compose, initialize_config_dir
from launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from lit_recon.settings.conf import CONF

SEED = 20261128
GROUPS = ("model", "data", "criterion", "pattern", "windows", "store", "module", "experiment")
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
]
NUMBERS = "0 1 -1 2 0.5 -0.5 1e30 1e-30 nan inf -inf 9999999999999999999999 007 1_0 3 8 0.1 2024 5e10123 1:30 1e400"
WORDS = "true false null abc 'abc' '' ??? half block sparse local mix documents row matrix disk bfloat16 cpu 16-mixed"
PATHS = "~/x ~nobody/x /home/zoë/x été 日本 /proc/x /dev/null /dev/null/x nowhere . .. / a/../b - -- % @x $HOME \\ a\\"
LISTS = "[] [1] [1,2] [abc] [a=b] [null] [[1]] {} {a:1} {a:{b:[1]}} [{a:1}] [ {a ] run[1] a=b a,b 1,2 a(b b) it's \" '"
GRAMMAR = "range(3) choice(1,2) glob(*) int(3) sort(2,1) a#b a;b ${seed} ${nope} ${oc.env:NOPE} ${hydra:job.num} ${"
TARGETS = "builtins.dict torch.load os.getcwd lit_recon lit_recon.modules.losses.mean_squared no.where.Class 1GiB -5GB"
OBJECTS = "{_target_:builtins.dict} {_target_:no.Where} {_target_:torch.nn.Linear} [{_target_:builtins.list}]"
VALUES = " ".join((NUMBERS, WORDS, PATHS, LISTS, GRAMMAR, TARGETS, OBJECTS)).split()
VALUES += ["", "a b", '"a b"', "6 apples", "a\tb", "a\nb", "x" * 5000]
NEW = """
    trainer.callbacks trainer.overfit_batches trainer.strategy trainer.max_time trainer.plugins trainer.deterministic
    trainer.limit_train_batches trainer.limit_val_batches trainer.fast_dev_run trainer.profiler
    trainer.gradient_clip_algorithm
    trainer.min_epochs trainer.default_root_dir trainer.detect_anomaly trainer.barebones trainer.check_val_every_n_epoch
    trainer.num_nodes trainer.inference_mode module.optimizer.betas module.optimizer.eps module.scheduler.x windows.size
    criterion.x pattern.x store.x data.x model.x chain.x module.retry_rates.x nope a.b.c""".split()
NONSENSE = ("nope=1", "data.nope=1", "nope", "=1", "é=1", "a b=1", "-x", "--nope", "[", "~", "+")


def leaves(node: DictConfig, name: str = "") -> Iterator[str]:
    """The settings of a configuration."""
    for key in node:
        below = f"{name}.{key}" if name else str(key)
        yield below
        child = node._get_node(key)
        if isinstance(child, DictConfig) and OmegaConf.is_dict(child) and not child._is_none():
            yield from leaves(child, below)


def lines(count: int) -> list[list[str]]:
    """Command lines, the same in every run."""
    draw = random.Random(SEED)
    settings: list[list[str]] = []
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        for base in BASES:
            settings.append(sorted(set(leaves(compose("fit", overrides=["model=hf", "data=files", *base])))))
    made = []
    for _ in range(count):
        index = draw.randrange(len(BASES))
        line = list(BASES[index])
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            kind, value = draw.random(), draw.choice(draw.choice((VALUES, VALUES, NUMBERS.split())))
            if kind < 0.06:
                line.append(f"~{draw.choice(settings[index])}")
            elif kind < 0.12:
                line.append(f"{draw.choice(GROUPS)}={value}")
            elif kind < 0.25:
                line.append(f"{draw.choice(('+', '++'))}{draw.choice(NEW)}={value}")
            elif kind < 0.28:
                line.append(draw.choice(NONSENSE))
            else:
                line.append(f"{draw.choice(settings[index])}={value}")
        made.append([*line, "plan=true"])
    return made


def problem(line: list[str], ended: Ended, left: list[str]) -> str | None:
    """What is wrong with how a command line ended."""
    said = ended.err + ended.out
    if ended.status not in (0, 2):
        return f"status {ended.status}"
    if "Traceback" in said or "Error executing job" in said:
        return "a traceback"
    if left:
        return f"left {left}"
    names = {re.split(r"[=@]", word)[0].lstrip("+~") for word in line} | {word.strip() for word in line}
    names |= {
        part for name in names for part in (name.rpartition(".")[0], name.partition(".")[0], name.rpartition(".")[2])
    } - {""}
    if ended.status == 2 and not any(name in ended.err for name in names if name not in ("", "plan")):
        return "no setting is named"
    return None


def fuzz(launcher: Launcher, settings: list[str], some: list[list[str]], folder: Path) -> list[Any]:
    """The command lines that did not end as they should."""
    found = []
    for line in some:
        own = {word.partition("=")[0].lstrip("+") for word in line}
        base = [word for word in settings if word.partition("=")[0] not in own]
        if "data=hub" in line:
            base = [word for word in base if not word.startswith("data.paths")]
        if "module=least_squares" in line:
            base = [word for word in base if not word.startswith("module.")]
        ended = launcher.run(*base, *line)
        left = [str(path) for path in folder.iterdir()]
        if (wrong := problem(line, ended, left)) is not None:
            found.append((wrong, line, ended.err[-1500:]))
    return found


@pytest.mark.parametrize("count", [40, pytest.param(1200, marks=pytest.mark.slow)])
def test_every_command_line_runs_or_is_refused_in_words_that_name_a_setting_and_leaves_nothing(
    count: int, launcher: Launcher, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fuzz(launcher, tiny_settings(model_folder, text_file), lines(count), tmp_path) == []
