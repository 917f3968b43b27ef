"""Tables as CSV and Markdown: numbers as they are, and nothing that a spreadsheet computes or Markdown draws."""

import csv
import io
import math
from pathlib import Path

import pytest
from finished_run import in_units

from lit_recon.report.groups import Group
from lit_recon.report.measures import PERPLEXITY, SECONDS, WALK_MEMORY
from lit_recon.report.runs import FAILED, FINISHED, Run
from lit_recon.report.tables import groups_table, runs_table


def run_of(name: str, value: str = "x", perplexity: float = 17.25) -> Run:
    """A finished run with one setting."""
    results = in_units(1)
    results["perplexity"] |= {"reconstructed": perplexity}
    return Run(Path(name), FINISHED, results=results, config={"key": value})


def rows(content: bytes) -> list[list[str]]:
    """A CSV file, read back."""
    return list(csv.reader(io.StringIO(content.decode(), newline="")))


def test_csv_has_numbers_as_they_are_and_units_in_its_header() -> None:
    table = runs_table({"a": run_of("a")}, ["key"], [PERPLEXITY, SECONDS, WALK_MEMORY])
    assert rows(table.as_csv()) == [
        ["number", "run", "state", "key", "perplexity_reconstructed", "total_seconds", "walk_peak_memory_gb"],
        ["1", "a", "finished", "x", "17.25", "71.04", "0.987654321"],
    ]


@pytest.mark.parametrize("text", ["=1+2", "+1", "-1", "@sum", "\t=1", "\r=1", '=HYPERLINK("http://x")'])
def test_text_that_a_spreadsheet_would_compute_is_prefixed_and_negative_numbers_are_not(text: str) -> None:
    broken = run_of(text, text)
    broken.results["perplexity"] |= {"reconstructed": -1.5}  # not a perplexity, but a number
    header, row = rows(runs_table({text: broken}, ["key"], [PERPLEXITY]).as_csv())
    assert row[1] == row[3] == f"'{text}" and row[4] == "-1.5"


def test_markdown_keeps_names_in_their_cell_and_shows_them_as_they_are() -> None:
    name = "a|b\n| x | <img src=x> &lt; [l](http://x) *b* `c` _d_ e_f"
    table = runs_table({name: run_of("a", name)}, ["key"], [PERPLEXITY]).as_markdown().decode()
    header, line, row = table.splitlines()
    assert line == "| ---: | --- | --- | --- | ---: |"
    shown = "a\\|b \\| x \\| \\<img src=x> \\&lt; \\[l](http://x) \\*b\\* \\`c\\` \\_d\\_ e_f"
    assert row == f"| 1 | {shown} | finished | {shown} | 17.25 |"


def test_a_run_that_has_not_finished_has_dashes_and_no_numbers() -> None:
    table = runs_table({"a": Run(Path("a"), FAILED, config={"key": 3})}, ["key", "other"], [PERPLEXITY])
    assert [cell.text for cell in table.rows[0]] == ["1", "a", "failed", "3", "–", "–"]
    assert rows(table.as_csv())[1] == ["1", "a", "failed", "3", "–", ""]
    assert table.rows[0][-1].order == "", "what has no number is sorted to the end"


def test_groups_have_means_deviations_and_numbers_of_runs() -> None:
    runs = [run_of("a", perplexity=18.0), run_of("b", perplexity=20.0), Run(Path("c"), FAILED)]
    table = groups_table([Group({"module.optimizer._target_": "AdamW"}, runs)], [PERPLEXITY])
    assert [column.label for column in table.columns] == ["module.optimizer", "runs", "perplexity, reconstructed"]
    assert [cell.text for cell in table.rows[0]] == ["AdamW", "2 of 3", "19.00 ± 1.41"]
    header, row = rows(table.as_csv())
    assert header[-2:] == ["perplexity_reconstructed_mean", "perplexity_reconstructed_standard_deviation"]
    assert row[:3] == ["AdamW", "2", "3"] and float(row[-1]) == pytest.approx(math.sqrt(2))


def test_names_that_are_no_utf_8_are_written_as_escapes() -> None:
    table = runs_table({"caf\udce9": run_of("a")}, [], [PERPLEXITY])
    assert b"caf\\udce9" in table.as_csv() and b"caf\\udce9" in table.as_markdown()
