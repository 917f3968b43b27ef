"""Tables of the README, made again from the folders of the runs that they tell of."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from finished_run import results_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that makes tables again from the folders of runs."""
    monkeypatch.syspath_prepend(str(ROOT / ".github"))
    return importlib.import_module("readme_tables")


def test_tables_are_made_again_from_the_folders_of_their_runs(tables: ModuleType, tmp_path: Path) -> None:
    for criterion, pruned, reconstructed in (("Wanda", 40.0, 30.0), ("Random", None, 400_000.0)):
        results = results_of(2)
        results["perplexity"] = {"dense": 20.0, "pruned": pruned, "reconstructed": reconstructed}
        results["recipe"] |= {"criterion": criterion}
        folder = tmp_path / "criteria" / criterion.lower()
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
    other = "<!-- runs: models other/* -->\nb\n<!-- /runs -->\n"
    text = f"a\n<!-- runs: criteria criteria/* -->\nold\n<!-- /runs -->\n{other}"
    assert tables.renewed(text, tables.Places(tmp_path)) == (
        "a\n<!-- runs: criteria criteria/* -->\n"
        "| criterion | pruned | reconstructed | nats over dense, pruned | reconstructed |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| random | – | 4.0e5 | nan | 9.90 |\n"
        "| Wanda | 40.00 | 30.00 | 0.69 | 0.41 |\n"
        f"<!-- /runs -->\n{other}"
    )
    with pytest.raises(ValueError, match="expected one of criteria, windows, models, findings, recovered"):
        tables.renewed("<!-- runs: colours x/* -->\n<!-- /runs -->", tables.Places(tmp_path))


def test_the_tables_of_the_readme_are_of_kinds_that_can_be_made_again(tables: ModuleType) -> None:
    kinds = re.findall(r"<!-- runs: (\w+) \S+ -->\n\|.+?\|\n<!-- /runs -->", README, re.DOTALL)
    assert {*kinds} == {*tables.TABLES, *tables.FINDINGS}
    assert README.count("<!-- runs: ") == README.count("<!-- /runs -->") == len(kinds)


def write_run(folder: Path, dense: float, pruned: float, reconstructed: float, tokens: int = 8192) -> None:
    """A finished run with these perplexities."""
    results = results_of(2) | {"peak_memory_bytes": 1_370_000_000, "tokens": {"calibration": tokens}}
    results["perplexity"] = {"dense": dense, "pruned": pruned, "reconstructed": reconstructed}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))


def test_cells_of_findings_are_made_again_of_the_runs_that_are_there_and_others_stay(
    tables: ModuleType, tmp_path: Path
) -> None:
    write_run(tmp_path / "runs" / "default", 10.0, 20.0, 15.0)
    write_run(tmp_path / "night" / "1_epochs" / "block", 10.0, 21.0, 14.0, 32768)
    write_run(tmp_path / "elsewhere", 10.0, 21.0, 14.5, 32768)
    text = (
        "<!-- runs: findings * -->\n"
        "| the paper finds | command | measured here |\n"
        "|---|---|---|\n"
        "| reconstruction wins back what it costs | `a=b\\|c` | old |\n"
        "| as well as global retraining | `fit` | old |\n"
        "| the window's size hardly matters | `fit` | old, of runs that are not there |\n"
        "| the criterion matters less | `fit` | old, too |\n"
        "<!-- /runs -->\n"
    )
    places = tables.Places(tmp_path / "runs", {"granularity": tmp_path / "night", "global": tmp_path / "elsewhere"})
    made = tables.renewed(text, places)
    assert made.splitlines()[3:7] == [
        "| reconstruction wins back what it costs | `a=b\\|c` | dense 10.00, pruned 20.00, reconstructed 15.00 on 8k "
        "tokens, 1.4 GB of memory |",
        "| as well as global retraining | `fit` | on 33k tokens, pruned 21.00: 14.00 by blocks at 1.4 GB; 14.50 all "
        "layers at once at 1.4 GB |",
        *text.splitlines()[5:7],
    ]
    assert tables.renewed(made, places) == made
    with pytest.raises(ValueError, match="the row 'another' is not one of reconstruction wins back"):
        tables.renewed(text.replace("as well as global retraining", "another"), places)
    with pytest.raises(ValueError, match="no row begins with the criterion matters less"):
        tables.renewed(text.replace("| the criterion matters less | `fit` | old, too |\n", ""), places)


def test_every_row_of_the_readmes_findings_is_made_again_from_runs(tables: ModuleType, tmp_path: Path) -> None:
    names = {
        name
        for rows in tables.FINDINGS.values()
        for cells in rows.values()
        for cell in cells
        for name in re.findall(r"\{([^.}]+)\.", cell)
    }
    for name in names:
        write_run(tmp_path / name, 1.25, 2.25, 1.75)
    made = tables.renewed(README, tables.Places(tmp_path))
    for kind, rows in tables.FINDINGS.items():
        table = made.partition(f"<!-- runs: {kind} * -->")[2].partition("<!-- /runs -->")[0]
        measured = [line for line in table.splitlines() if "1.75" in line]
        assert len(measured) == len(rows), kind
        assert not re.findall(r"\b\d\d\.\d\d\b", "".join(line.rpartition("` | ")[2] for line in measured))


def test_the_command_says_whether_the_readme_has_the_numbers_of_the_runs(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "here", 10.0, 20.0, 15.0)
    readme = tmp_path / "README.md"
    row = "| local reconstruction recovers much | `fit` | 1.00 | 2.00 |\n"
    others = "| the same without correcting | `a` | 1 | 2 |\n| also for 2:4 sparsity | `b` | 3 | 4 |\n"
    readme.write_text(
        f"<!-- runs: recovered * -->\n| a | b | c | d |\n|---|---|---|---|\n{row}{others}<!-- /runs -->\n"
    )
    monkeypatch.setattr(tables, "README", readme)
    command = ["readme_tables", "--runs", str(tmp_path), f"default={tmp_path / 'here'}"]
    monkeypatch.setattr("sys.argv", [*command, "--check"])
    assert tables.main() == 1 and capsys.readouterr().out == "others\n"
    monkeypatch.setattr("sys.argv", command)
    assert tables.main() == 0
    assert row.replace("1.00 | 2.00", "20.00 | 15.00") + others in readme.read_text()
    monkeypatch.setattr("sys.argv", [*command, "--check"])
    assert tables.main() == 0 and capsys.readouterr().out.endswith("the same\n")
    monkeypatch.setattr("sys.argv", ["readme_tables", "default=nowhere"])
    with pytest.raises(SystemExit) as ended:
        tables.main()
    assert ended.value.code == 2 and "expected NAME=FOLDER" in capsys.readouterr().err
