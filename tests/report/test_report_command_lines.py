"""Command lines of lit_recon.report, drawn at random: each draws what it can, or is refused in words."""

import random
import re
import shutil
from pathlib import Path

import pytest
from finished_run import in_units, make_run
from odd_words import VALUES, ended_here, files

from lit_recon.report.__main__ import main

SEED = 20261130
RUNS = ("runs/wanda", "runs/magnitude", "runs/ria", "runs/stopped", "runs/damaged", "runs", "empty", "words.txt")
KEYS = ("seed", "criterion", "criterion._target_", "module.optimizer.lr", "seed,criterion", "nope", "seed,nope")
OUTS = ("out", "runs", "out/deep", "words.txt", "words.txt/x", "runs/wanda", "empty", ".")


def lines(count: int) -> list[list[str]]:
    """Command lines, the same in every run; what they write lies in the working directory."""
    draw, made = random.Random(SEED), []
    inside = [value for value in VALUES if not re.match(r"[/~.]|$", value)]
    for _ in range(count):
        line = [draw.choice(RUNS if draw.random() < 0.8 else inside) for _ in range(draw.choice((0, 1, 1, 2, 3)))]
        for _ in range(draw.choice((0, 0, 1, 2))):
            option = draw.choice(("--out", "--group", "--group", "--markdown", "--nope", "-x"))
            line.append(option)
            if option in ("--out", "--group") and draw.random() < 0.95:
                likely = OUTS if option == "--out" else KEYS
                line.append(draw.choice(likely if draw.random() < 0.6 else inside))
        made.append(line)
    return made


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs in several states, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("wanda", "magnitude", "ria"):
        results = in_units(2)
        results["recipe"]["criterion"] = name
        config = f"seed: 7\ncriterion:\n  _target_: lit_recon.{name}\nmodule:\n  optimizer:\n    lr: 1e-3\n"
        make_run(Path("runs", name), results, curves=False).joinpath("config.yaml").write_text(config)
    for name in ("stopped", "damaged"):
        shutil.copytree("runs/ria", f"runs/{name}")
    Path("runs/stopped/results.json").unlink()
    Path("runs/damaged/results.json").write_text("{")
    Path("empty").mkdir()
    Path("words.txt").write_text("no run")
    return tmp_path


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_line_draws_what_it_can_or_is_refused_in_words_and_writes_nothing(
    count: int,
    runs: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = tmp_path_factory.mktemp("kept") / "runs"
    shutil.copytree(runs, kept)
    before, wrong, statuses = files(runs), [], set()
    for line in lines(count):
        status, out, err, _ = ended_here(main, line, capfd)
        statuses.add(status)
        new = files(runs) - before
        drawn = "report.html" in " ".join(new) or "--markdown" in line or "Report:" in out or "runs/" in out
        said_why = status == 0 or err.strip()
        if (
            status not in (0, 2)
            or "Traceback" in err
            or "\x1b" in out + err
            or not said_why
            or (status == 2 and new and not drawn)
        ):
            wrong.append((line, status, sorted(new)[:5], out[-300:], err[-1500:]))
        refused = "usage:" in err or "--group" in err
        if refused and new:
            wrong.append((line, "refused, but wrote", sorted(new)[:5], err[-500:]))
        if new:
            for path in runs.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.copytree(kept, runs, dirs_exist_ok=True)
    assert wrong == []
    assert statuses == {0, 2}
