"""Checkpoints of other tools, of which there are evaluations alone, are rows of the page over many runs."""

import copy
import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from many_runs import MARKUP, evaluations_of, make_many

from lit_recon.report import page
from lit_recon.report.__main__ import main
from lit_recon.report.measures import GAP, NATS, NATS_PRUNED, PERPLEXITY, SECONDS
from lit_recon.report.overview import write_overview
from lit_recon.report.runs import protocol_of, read_run, read_runs


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command without the pages of single runs, which take seconds."""
    monkeypatch.setattr(page, "write_report", lambda run, out: run)


def checkpoint(folder: Path, content: dict[str, Any] | None = None) -> Path:
    """The folder of a model with evaluations."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "evaluations.json").write_text(json.dumps(content or evaluations_of("x")), encoding="utf-8")
    return folder


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    """runs.csv by the names of the runs."""
    with (folder / "runs.csv").open(newline="", encoding="utf-8") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_a_checkpoint_has_its_newest_evaluation_and_nothing_is_wrong_with_it(tmp_path: Path) -> None:
    content = evaluations_of("x")
    later = copy.deepcopy(content["evaluations"][0]["perplexity"])
    later["perplexity"] = {"dense": 10.0, "checkpoint": 11.0}
    content["evaluations"].append({"when": "later", "perplexity": later | {"gap_recovered": None}})
    run = read_run(checkpoint(tmp_path / "other", content))
    assert run.state == "evaluated" and run.is_expected and not run.message
    assert PERPLEXITY.of(run) == 11.0 and NATS.of(run) == pytest.approx(math.log(1.1))
    for measure in (NATS_PRUNED, GAP, SECONDS):
        assert math.isnan(measure.of(run)) and measure.text_of(run) == "–"
    assert protocol_of(run) == "wikitext2 x, 141 x 2048 tokens"


def test_it_is_a_row_next_to_the_runs_and_in_no_group_of_theirs(tmp_path: Path) -> None:
    runs = make_many(tmp_path, (1e-3, 3e-4), (8,), (0, 1))
    other = checkpoint(tmp_path / "wanda_of_others")
    text = write_overview(read_runs([*runs, other]), tmp_path / "out").read_text(encoding="utf-8")
    assert "4 finished, 1 evaluated" in text and '<span class="state evaluated">evaluated</span>' in text
    rows = rows_of(tmp_path / "out")
    row = rows["wanda_of_others"]
    assert row["state"] == "evaluated" and row["perplexity_on"] == "wikitext2 x, 141 x 2048 tokens"
    assert [float(row[f"perplexity_{state}"]) for state in ("dense", "pruned", "reconstructed")] == [10.0, 20.0, 12.5]
    assert float(row["nats_over_dense"]) == pytest.approx(math.log(1.25)) and row["gap_recovered"] == "0.75"
    assert (row["kl_nats_per_token"], row["top1_agreement"], row["tasks_mean"]) == ("0.0625", "0.8125", "0.625")
    assert row["tasks"] == "boolq acc 0.625" and row["total_seconds"] == row["held_out_error"] == ""
    assert rows["lr0.001_n8_s0"]["perplexity_on"] == "python_docs, 16 x 512 tokens"
    groups = (tmp_path / "out" / "groups.csv").read_text()
    assert len(groups.splitlines()) == 3, "two rates"
    # 12.5 is lower than that of every run, on another text
    assert "The lowest perplexity" in text and "of wanda_of_others" not in text
    alone = write_overview(read_runs(runs), tmp_path / "alone").read_text(encoding="utf-8")
    assert "Evaluated:" not in alone
    assert not {"perplexity_on", "tasks"} & rows_of(tmp_path / "alone")["lr0.001_n8_s0"].keys()


def test_checkpoints_alone_have_a_page_and_records_of_models_of_the_hub_count_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = checkpoint(tmp_path / "models" / MARKUP, evaluations_of(MARKUP))
    record = tmp_path / "evaluations" / "org--name.json"
    record.parent.mkdir()
    record.write_text(json.dumps(evaluations_of("y")))
    assert main([str(other), "--markdown"]) == 0
    assert "| evaluated | 10.00 | 20.00 | 12.50 | 75.0% |" in capsys.readouterr().out
    assert MARKUP not in (other / "report.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in other.parent.iterdir()) == [MARKUP], "no page over one checkpoint"
    assert main([str(record)]) == 0
    page_of_record = record.with_suffix("") / "report.html"
    assert f"Report: {page_of_record}\n" in capsys.readouterr().out
    assert "<h1>org/name</h1>" in page_of_record.read_text(encoding="utf-8")
    found = [str(other), *map(str, record.parent.iterdir())]  # as evaluations/* has the page's folder as well
    assert main([*found, "--out", str(tmp_path / "out")]) == 0 and len(found) == 3
    row = rows_of(tmp_path / "out")["evaluations/org--name.json"]
    assert (row["state"], row["perplexity_reconstructed"]) == ("evaluated", "12.5")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert 'href="../evaluations/org--name/report.html"' in text and text.count('/report.html"') == 2


def test_of_several_checkpoints_only_a_page_that_is_older_than_its_evaluations_is_drawn_again(tmp_path: Path) -> None:
    two = [checkpoint(tmp_path / name) for name in ("one", "other")]
    assert main(list(map(str, two))) == 0
    os.utime(two[0] / "evaluations.json", (4e9, 4e9))
    for folder in two:
        (folder / "report.html").write_text((folder / "report.html").read_text(encoding="utf-8") + "<!-- old -->")
    assert main(list(map(str, two))) == 0
    assert ["<!-- old -->" in (folder / "report.html").read_text(encoding="utf-8") for folder in two] == [False, True]


def test_what_cannot_be_read_of_evaluations_alone_is_said_and_counts_as_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = checkpoint(tmp_path / "damaged")
    (damaged / "evaluations.json").write_text("{")
    run = read_run(damaged)
    assert run.state == "damaged" and not run.is_expected
    assert main([str(damaged), str(checkpoint(tmp_path / "good"))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "evaluations.json: cannot be read as JSON" in line
    empty = checkpoint(tmp_path / "empty", {"version": 1, "evaluations": []})
    assert read_run(empty).state == "no run" and "no results.json here" in read_run(empty).message


def test_files_of_a_run_are_no_records(tmp_path: Path) -> None:
    (run,) = make_many(tmp_path, (1e-3,), (8,), (0,))
    (run / "evaluations.json").write_text(json.dumps(evaluations_of("x")))
    assert read_run(run / "evaluations.json").state == "no run"
    assert read_run(run / "evaluations.json").message.endswith("with its results.json in it.")
