"""The table that compares runs, on the terminal and in Markdown."""

import re
from pathlib import Path

import pytest
from finished_run import NEW, in_units, make_run, results_of

from lit_recon.report import overview, page
from lit_recon.report.__main__ import main
from lit_recon.report.comparison import COLUMNS


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command without its pages, which take seconds; test_main.py and one test here have them."""
    monkeypatch.setattr(page, "write_report", lambda run, out: run)
    monkeypatch.setattr(overview, "write_overview", lambda runs, out, keys: runs[0].folder)


@pytest.fixture
def granularity(tmp_path: Path) -> list[str]:
    """The folders of three runs that differ in their windows, one with another module, one of an earlier version."""
    matrix, half, old = results_of(2) | NEW, results_of(2) | NEW, results_of(2)
    matrix["recipe"] |= {"windows": "matrix", "module": "LeastSquares"}
    half["recipe"] |= {"windows": "half", "module": "MaskedWeights", "learning_rate": "0.002"}
    half["seconds"] |= {"fit": 3700.0, "total": 12345.6}
    half["perplexity"] |= {"pruned": 123456.789}
    folder = tmp_path / "runs" / "granularity"
    runs = {"matrix_least_squares": matrix, "half": half, "block": old}
    return [str(make_run(folder / name, results)) for name, results in runs.items()]


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": "60"}])  # pipe, terminal
@pytest.mark.usefixtures("undrawn")
def test_the_table_has_a_row_of_whole_numbers_per_run_in_120_columns(
    granularity: list[str],
    environment: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    main(granularity)
    lines = [re.sub(r"\x1b\[\d*m", "", line).strip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 120 and not any("…" in line for line in lines)
    shared = "tiny-llama, Wanda, unstructured 50% per row, 8,192 calibration tokens"
    assert lines[0].startswith(shared) and "16 x 512 tokens" in " ".join(lines[:2])
    rows = [line for line in lines if "14.90" in line]
    first = "matrix_least_squares 14.90 22.35 17.30 67.8% 0.123 41.0 s 71.0 s 0.99 1.05 1.51"
    assert len(rows) == 3 and rows[0].split() == first.split()
    for text in ("half", "123,456.79", "1 h 01 min", "3 h 25 min", "0.99"):
        assert text in rows[1], text
    assert rows[2].split()[4:] == ["67.8%", "–", "41.0", "s", "71.0", "s", "–", "–", "1.51"]
    assert "matrix, LeastSquares" in lines and "half" in lines and "block" in lines


def test_markdown_is_the_whole_output_and_has_the_same_rows(
    granularity: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["--markdown", *granularity]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| run | window | perplexity, dense | perplexity, pruned | perplexity, reconstructed | "
        "share of the gap | relative error | time, walk | time, total | peak GB, walk | "
        "peak GB, planned | peak GB, total |",
        "| --- | --- |" + " ---: |" * 10,
        "| matrix_least_squares | matrix, LeastSquares | 14.90 | 22.35 | 17.30 | 67.8% | 0.123 | "
        "41.0 s | 71.0 s | 0.99 | 1.05 | 1.51 |",
        "| half | half | 14.90 | 123,456.79 | 17.30 | 67.8% | 0.123 | 1 h 01 min | 3 h 25 min | 0.99 | 1.05 | 1.51 |",
        "| block | block | 14.90 | 22.35 | 17.30 | 67.8% | – | 41.0 s | 71.0 s | – | – | 1.51 |",
    ]
    assert all(Path(run, "report.html").exists() for run in granularity)


@pytest.mark.usefixtures("undrawn")
def test_markdown_shows_names_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = results_of(1)
    results["recipe"]["windows"] = "a|b <i>*c*"
    main([str(make_run(tmp_path / "x|y", results)), "--markdown"])
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith("| x\\|y | a\\|b \\<i>\\*c\\* | 14.90 |")
    assert row.replace("\\|", "").count("|") == len(COLUMNS) + 1


@pytest.mark.usefixtures("undrawn")
def test_rows_name_every_setting_in_which_runs_differ_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = results_of(1), results_of(1) | {"seed": 8, "tokens": {"calibration": 32768}}
    first["recipe"] |= {"learning_rate": "0.001", "epochs": "1"}
    second["recipe"] |= {"learning_rate": "0.002", "epochs": "1", "statistics": "sparse"}
    runs = [make_run(tmp_path / "a" / "run", first), make_run(tmp_path / "b" / "run", second)]
    main(["--markdown", *map(str, runs)])
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| a/run", "block, learning rate 0.001, 8,192 calibration tokens, seed 7"],
        ["| b/run", "block, learning rate 0.002, 32,768 calibration tokens, seed 8"],
    ]


@pytest.mark.usefixtures("undrawn")
def test_the_default_module_is_not_named_neither_by_its_name_of_today_nor_by_that_of_version_0_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for module in ("MaskedWeights", "ReconstructionModule", "Mine"):
        results = results_of(1)
        results["recipe"]["module"] = module
        runs.append(str(make_run(tmp_path / module, results, curves=False)))
    main(["--markdown", *runs])
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[1] for row in rows] == ["block", "block", "block, Mine"]


@pytest.mark.usefixtures("undrawn")
def test_perplexities_after_other_openings_are_not_said_to_be_on_the_same_sequences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for name, opening in (("with", "<s>"), ("without", "none")):
        results = results_of(1) | NEW
        results["protocol"]["opening"] = opening
        folders.append(str(make_run(tmp_path / "runs" / name, results)))
    main(folders)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("16 x 512 tokens") == 2 and "16 x 512 tokens, each after <s>" in said


@pytest.mark.usefixtures("undrawn")
def test_errors_of_two_versions_are_not_said_to_be_in_one_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {"old": results_of(1) | NEW, "new": in_units(1), "newer": in_units(1)}
    folders = {name: str(make_run(tmp_path / name, results, curves=False)) for name, results in runs.items()}
    main(["--markdown", *folders.values()])
    _, _, *rows = capsys.readouterr().out.splitlines()
    units = [row.split(" | ")[1].removeprefix("block, error in units of the dense states' ") for row in rows]
    assert units == ["variance", "median energy", "median energy"]
    main(["--markdown", folders["new"], folders["newer"]])
    assert "units" not in capsys.readouterr().out
