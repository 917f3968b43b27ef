"""Command lines of lit_recon.verify, drawn at random: each says what it found, or what it cannot look at, and why."""

import random
import shutil
from pathlib import Path

import pytest
from odd_words import VALUES, ended_here, files
from tiny_folders import pruned_folder

from lit_recon.verify.__main__ import main

SEED = 20261129
OPTIONS = ("--masks", "--pattern", "--sparsity", "--tolerance", "--dense")
FLAGS = ("--all", "--json")
FOLDERS = ("model", "bare", "empty", "damaged", "model/config.json", "model.masks.safetensors", "run")
LIKELY = {
    "--masks": ("model.masks.safetensors", "model/model.safetensors", "damaged/model.safetensors"),
    "--pattern": ("2:4", "4:8", "1:4", "3:2", "0:0", "2:999", "2;4"),
    "--sparsity": ("0.5", "0.9", "1", "1e-9"),
    "--tolerance": ("0", "0.01", "0.999"),
    "--dense": ("model", "bare", "run", "empty"),
}


def lines(count: int) -> list[list[str]]:
    """Command lines, the same in every run."""
    draw, made = random.Random(SEED), []
    for _ in range(count):
        line = [draw.choice(FOLDERS if draw.random() < 0.8 else VALUES)]
        for _ in range(draw.choice((0, 1, 1, 2, 3))):
            option = draw.choice((*OPTIONS, *OPTIONS, *FLAGS, "--nope", "-x"))
            line.append(option)
            if option in OPTIONS and draw.random() < 0.95:
                line.append(draw.choice(LIKELY[option] if draw.random() < 0.6 else VALUES))
        made.append(line)
    return made


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Model folders of several kinds, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder, masks = pruned_folder(tmp_path / "model")
    shutil.copytree(folder, "run/checkpoint")
    shutil.copy(masks, "run/masks.safetensors")
    for name in ("bare", "damaged", "empty"):
        Path(name).mkdir()
    shutil.copy(folder / "model.safetensors", "bare")
    shutil.copy(folder / "config.json", "damaged")
    Path("damaged/model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    return tmp_path


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_line_finds_something_or_is_refused_in_words_and_writes_nothing(
    count: int, folders: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, wrong, statuses = files(folders), [], set()
    for line in lines(count):
        status, out, err, _ = ended_here(main, line, capfd)
        statuses.add(status)
        refused = status == 2 and (not err.strip() or out.strip())
        if status not in (0, 1, 2) or refused or "Traceback" in err or "\x1b" in out + err or files(folders) != before:
            wrong.append((line, status, out[-300:], err[-1500:]))
    assert wrong == []
    assert statuses == {0, 1, 2}
