"""The command `python -m lit_recon.report`: what it writes and prints, what it refuses, and what it need not load."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import cpu_seconds
from finished_run import REFUSED, make_run, results_of

from lit_recon.report import page
from lit_recon.report.__main__ import main
from lit_recon.report.run_files import read_results

ROOT = Path(__file__).parents[2]
DRAWING = {"matplotlib", "numpy", "PIL", "jinja2", "rich", "tensorboard"}
TRAINING = {"torch", "lightning", "pytorch_lightning", "transformers", "datasets", "hydra"}
LIST_MODULES = """
import atexit, runpy, sys
atexit.register(lambda: print("modules:", *sys.modules, file=sys.stderr))
runpy.run_module("lit_recon.report", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def two_windows(tmp_path: Path) -> Path:
    """A run of two windows, the second of which was refused."""
    results = results_of(2)
    results["windows"][1] |= REFUSED
    return make_run(tmp_path / "two", results)


def test_the_command_rewrites_each_report_and_prints_one_table(
    two_windows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = results_of(3) | {"gap_recovered": 0.5125, "peak_memory_bytes": 2_340_000_000}
    results["recipe"] |= {"criterion": "Magnitude", "pattern": "2:4 [kept]"}
    other = make_run(tmp_path / "other", results)
    (two_windows / "report.html").write_text("old", encoding="utf-8")
    monkeypatch.setenv("COLUMNS", "200")
    assert main([str(two_windows), str(other)]) == 0
    table = capsys.readouterr().out
    for text in (
        "tiny-llama",
        "block, Wanda, unstructured 50% per row",
        "67.8%",
        "block, Magnitude, 2:4 [kept]",
        "51.2%",
    ):
        assert text in table, text
    for text in ("14.90", "22.35", "17.30", "71.0 s", "1.51", "2.34"):
        assert text in table, text
    assert table.count("recon-") == 1
    assert "67.8%" in (two_windows / "report.html").read_text(encoding="utf-8")
    assert (other / "report.html").exists() and (other / "figures" / "time.png").exists()


def test_of_several_runs_the_pages_that_are_not_current_are_drawn(
    two_windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, drawn, write = make_run(tmp_path / "other", results_of(3)), list[str](), page.write_report

    def noting(run: Path, out: Path | None = None) -> Path:
        drawn.append(run.name)
        return write(run, out)

    monkeypatch.setattr(page, "write_report", noting)
    both, out = [str(two_windows), str(other)], ["--out", str(tmp_path / "out")]
    for expected in ([two_windows.name, "other"], []):
        drawn.clear()
        assert main([*both, *out]) == 0
        assert drawn == expected
    (other / "results.json").write_bytes((other / "results.json").read_bytes())  # anew
    assert main([*both, *out]) == 0
    monkeypatch.setattr(page, "MADE_BY", "lit_recon 99.0")
    assert main([*both, *out]) == 0
    assert main([str(other)]) == 0, "one alone is drawn in any case"
    assert drawn == ["other", two_windows.name, "other", "other"]


def test_folders_that_are_no_runs_get_one_message_each_and_status_2_and_other_runs_are_shown(
    two_windows: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    runs = [str(two_windows), str(tmp_path / "empty"), str(tmp_path / "nowhere")]
    done = subprocess.run(
        [sys.executable, "-m", "lit_recon.report", *runs], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 2 and "67.8%" in done.stdout
    expected = "expected the folder of a finished run, with its results.json in it."
    assert done.stderr.splitlines() == [
        f"{runs[1]}: no results.json here; {expected}",
        f"{runs[2]}: not a folder; {expected}",
    ]
    with pytest.raises(ValueError, match=r"in it, such as those of .*/\*\.$"):
        read_results(two_windows.parent)
    assert (two_windows / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "it is no mapping of names to values"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"perplexity": {}}', "without gap_recovered, protocol"),
        ('{"perplexity": {}}', "without perplexity.dense, perplexity.pruned"),
    ],
)
def test_a_results_file_of_something_else_is_refused(
    content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    assert main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert words in message and str(tmp_path / "results.json") in message and message.count("\n") == 1


def test_a_report_that_cannot_be_written_gets_one_message(
    two_windows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (two_windows / "report.html").mkdir()
    assert main([str(two_windows)]) == 2
    assert "the report cannot be written" in capsys.readouterr().err


def libraries(*arguments: str | Path) -> set[str]:
    """The top-level modules that a process of the command has loaded when it ends."""
    command = [sys.executable, "-c", LIST_MODULES, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    *_, modules = done.stderr.splitlines()
    assert modules.startswith("modules: sys "), done.stderr
    return {name.partition(".")[0] for name in modules.split()}


@pytest.mark.parametrize("argument", ["--help", "nowhere"])
def test_help_and_refusals_load_no_library(argument: str) -> None:
    loaded = libraries(argument)
    assert "lit_recon" in loaded and not loaded & (DRAWING | TRAINING)


def test_reports_are_made_without_torch(two_windows: Path) -> None:
    other = results_of(2)
    other["recipe"]["criterion"] = "Magnitude"
    loaded = libraries(two_windows, make_run(two_windows.parent / "other", other, curves=False))
    assert (two_windows / "figures" / "learning_curves.png").exists()
    assert (two_windows.parent / "criteria.png").exists()
    assert loaded >= DRAWING and not loaded & TRAINING


def test_help_takes_less_than_a_second_and_a_half() -> None:
    assert cpu_seconds("-m", "lit_recon.report", "--help") < 1.5
