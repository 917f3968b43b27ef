"""Command lines of lit_recon.evaluate, drawn from all of its settings: each evaluates, or is refused in words."""

import random
import re
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from launcher import Launcher
from odd_words import NONSENSE, NUMBERS, VALUES, ended_in_time, files, leaves, name_of, problem

from lit_recon.settings.conf import CONF

SEED = 20261201
BASES: list[list[str]] = [
    [],
    ["dense=dense"],
    ["dense=dense", "drift=true"],
    ["perplexity=false", "agreement=false", "prompts=[some words]", "max_new_tokens=3"],
    ["data.stride=8", "opening_at=text"],
    ["data=hub", "data.name=no/where", "data.evaluation_samples=0"],  # refused before the Hub is asked
]
NEW = "trainer.strategy trainer.max_epochs trainer.callbacks data.x model.x nope a.b.c checkpoint.x".split()
OWN = [
    "checkpoint=theirs",
    "data=files",
    "data.paths=[words.txt]",
    "data.evaluation_samples=2",
    "trainer.accelerator=cpu",
]
OWN += ["data.evaluation_length=16", "data.bos=false"]


def lines(count: int) -> list[list[str]]:
    """Command lines, the same in every run; what they write lies in the working directory."""
    draw, made = random.Random(SEED), []
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        composed = [compose("evaluate", overrides=["data=files", *base]) for base in BASES]
    settings = [sorted({*leaves(one)} - {"unsafe_code"}) for one in composed]
    while len(made) < count:
        index = draw.randrange(len(BASES))
        line = list(BASES[index])
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            kind, value = draw.random(), draw.choice(draw.choice((VALUES, VALUES, NUMBERS.split())))
            if kind < 0.06:
                line.append(f"~{draw.choice(settings[index])}")
            elif kind < 0.12:
                line.append(f"data={value}")
            elif kind < 0.2:
                line.append(f"{draw.choice(('+', '++'))}{draw.choice(NEW)}={value}")
            elif kind < 0.24:
                line.append(draw.choice(NONSENSE))
            else:
                line.append(f"{draw.choice(settings[index])}={value}")
        if not any(re.match(r"record=\W*[/~.]", word) for word in line):
            made.append(line)
    return made


@pytest.mark.parametrize("count", [12, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_line_evaluates_or_is_refused_in_words_that_name_a_setting_and_leaves_nothing(
    count: int, launcher: Launcher, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("theirs", "dense"):
        shutil.copytree(model_folder, name)
    shutil.copy(text_file, "words.txt")
    before, wrong = files(tmp_path), []
    for line in lines(count):
        given = {name_of(word) for word in line}
        own = [word for word in OWN if name_of(word) not in given and not ("data=hub" in line and "paths" in word)]
        ended, stopped = ended_in_time(launcher, *own, *line, command="evaluate")
        new = files(tmp_path) - before
        kept = sorted(new) if ended.status else []  # one that evaluates adds to a record
        if (found := problem(line, ended, kept, allowed=(0, 1, 2) if stopped else (0, 2))) is not None:
            wrong.append((found, line, ended.err[-1500:]))
        if not ended.status and not new:
            wrong.append(("no record", line, ended.out[-500:]))
        for name in sorted(new, reverse=True):
            (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
    assert wrong == []
