"""The page of a checkpoint that no run here made: the newest answers of all its evaluations, in one file."""

import copy
import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from many_runs import MARKUP, SCRIPT, evaluations_of

from lit_recon.report.checkpoint_page import facts, verdict, write_checkpoint_report
from lit_recon.report.evaluation_section import evaluation_section, evaluation_tables
from lit_recon.report.evaluations import read_evaluations


def written(folder: Path, *entries: dict[str, Any]) -> Path:
    """The folder of a model with these evaluations."""
    folder.mkdir(parents=True)
    (folder / "evaluations.json").write_text(json.dumps({"version": 1, "evaluations": entries}), encoding="utf-8")
    return folder


def entry(**changes: Any) -> dict[str, Any]:
    """An evaluation of a foreign checkpoint, whose dense model is known and whose pruned one is not."""
    (made,) = copy.deepcopy(evaluations_of("x"))["evaluations"]
    for numbers in (made["perplexity"]["perplexity"], made["perplexity"]["nats"]):
        del numbers["pruned"]
    del made["perplexity"]["gap_recovered"]
    return made | changes


def later() -> dict[str, Any]:
    """A second evaluation: other text, one task again and one more, one prompt again, and nothing else."""
    made = entry(when="2026-12-01T08:00:00+00:00", agreement=None, drift=None)
    made["perplexity"]["protocol"] |= {"dataset": "c4 validation", "opening": "<s>", "opening_at": "text"}
    made["perplexity"]["perplexity"] = {"dense": 8.0, "checkpoint": 16.0}
    made["perplexity"]["nats"] = {"dense": math.log(8), "checkpoint": math.log(16)}
    again = {"task": "boolq", "metric": "acc", "state": "checkpoint", "value": 0.5, "stderr": 0.02}
    more = {"task": "rte", "metric": "acc", "state": "checkpoint", "value": 0.25, "samples": 277, "fewshot": 0}
    made["tasks"] = {"harness": "0.4.10", "results": [again, more], "mean": {"checkpoint": 0.375}}
    made["continuations"] = [{"prompt": "Once x", "texts": {"checkpoint": "anew"}}]
    return made


def texts(table: Any) -> list[list[str]]:
    """The rows as people read them."""
    return [[cell.text for cell in row] for row in table.rows]


def test_one_evaluation_has_a_page_with_all_that_was_measured(tmp_path: Path) -> None:
    model = written(tmp_path / "theirs", entry())
    assert write_checkpoint_report(model, model) == model / "report.html"
    page = " ".join((model / "report.html").read_text(encoding="utf-8").split())
    for said in (
        *("<h1>theirs</h1>", "run/checkpoint · compared with org/dense · 1 evaluation"),
        *("0.223 nats per token worse than the dense model: perplexity 12.50 instead of 10.00", "12.50 (2.526)"),
        *("0.0625 nats per token", "at 81.2% of 8,176 tokens", "62.5% ± 1.0%", "lm-eval 0.4.9", "repeats itself"),
        *("load 1.5 s, measure 90.2 s, prompts 8.2 s", "1.25 GB", "lit_recon 0.8.0"),
        "checkpoint=run/checkpoint dense=org/dense",
    ):
        assert said in page, said
    assert "gap recovered" not in page, "nothing is known of a pruned model"
    drawn = sorted(path.name for path in (model / "figures").iterdir())
    assert drawn == ["drift.png", "hidden_states.png", "time.png"]
    assert page.count('<img src="data:image/png;base64,') == 3 and not list(model.glob("*.csv"))


def test_of_several_evaluations_all_texts_are_rows_and_the_newest_answer_to_a_task_or_prompt_counts(
    tmp_path: Path,
) -> None:
    model = written(tmp_path / "theirs", entry(), later())
    evaluations, remarks = read_evaluations(model)
    tables = evaluation_tables(evaluations)
    assert not remarks
    assert [column.label for column in tables["perplexities"].columns] == [
        *("text", "dense", "this checkpoint", "nats over dense", "protocol"),
    ]
    assert [row[:4] for row in texts(tables["perplexities"])] == [
        ["wikitext2 x", "10.00 (2.303)", "12.50 (2.526)", "0.223"],
        ["c4 validation", "8.00 (2.079)", "16.00 (2.773)", "0.693"],
    ]
    assert "opening <s>, opening at text" in texts(tables["perplexities"])[1][4]
    assert texts(tables["tasks"]) == [  # task, metric, dense, this checkpoint, samples, shots
        [MARKUP, "acc", "75.0%", "–", "100", "–"],
        ["boolq", "acc", "–", "50.0% ± 2.0%", "–", "–"],
        ["rte", "acc", "–", "25.0%", "277", "0"],
        ["mean", "acc", "75.0%", "62.5%", "", ""],
        ["mean", "acc", "–", "37.5%", "", ""],
    ]
    assert [row[2] for row in texts(tables["evaluations"])] == [
        "perplexity, agreement, drift, tasks, prompts",
        "perplexity, tasks, prompts",
    ]
    section = evaluation_section(evaluations)
    assert section["continuations"] == [{"prompt": "Once x", "texts": {"checkpoint": "anew"}}]
    assert section["agreement"]["kl"] == 0.0625
    assert [fact.text for fact in facts(evaluations)] == ["8.00", "16.00", "0.693", "0.0625", "81.2%", "37.5%"]


def test_the_page_of_a_record_and_its_tables_go_where_they_are_asked_for(tmp_path: Path) -> None:
    model = written(tmp_path / "theirs", entry(), later())
    record = (model / "evaluations.json").rename(tmp_path / "org--name.json")
    page = write_checkpoint_report(record, tmp_path / "out").read_text(encoding="utf-8")
    assert "<h1>org/name</h1>" in page and 'href="../org--name.json"' in page
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(
        [*(f"{one}.{kind}" for one in ("evaluations", "perplexities", "tasks") for kind in ("csv", "md"))]
        + ["figures", "report.html"]
    )
    with (tmp_path / "out" / "perplexities.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["nats_over_dense"]) for row in rows] == pytest.approx([math.log(1.25), math.log(2)])
    assert float(rows[1]["nats_checkpoint"]) == pytest.approx(math.log(16))


@pytest.mark.parametrize(
    ("perplexity", "kind", "said"),
    [
        ({"checkpoint": 12.5}, "neutral", "Perplexity 12.50; no dense model was given"),
        ({"dense": 10.0, "checkpoint": None}, "bad", "is broken"),
        ({"dense": 10.0, "checkpoint": 9.5}, "good", "No worse than the dense model: perplexity 9.50 instead of 10.00"),
        ({"dense": 10.0, "checkpoint": 20.0}, "neutral", "0.693 nats per token worse"),
    ],
)
def test_the_verdict_says_what_is_known(perplexity: dict[str, Any], kind: str, said: str) -> None:
    found = verdict({"protocol": {}, "perplexity": perplexity})
    assert found[0] == kind and said in found[1]


def test_a_record_of_tasks_alone_has_a_page_without_perplexity(tmp_path: Path) -> None:
    only = {name: None for name in ("perplexity", "agreement", "drift", "continuations", "seconds")}
    model = written(tmp_path / "theirs", entry(**only))
    page = write_checkpoint_report(model, model).read_text(encoding="utf-8")
    assert "62.5%" in page and "<h3>Perplexity</h3>" not in page and "<img" not in page
    assert verdict(None) == ("neutral", "")


def test_nothing_in_a_record_becomes_markup(tmp_path: Path) -> None:
    bad = MARKUP + SCRIPT
    model = written(tmp_path / "theirs", entry(when=bad, checkpoint=bad, dense=bad, versions={bad: bad}))
    page = write_checkpoint_report(model, model).read_text(encoding="utf-8")
    assert MARKUP not in page and len(re.findall(r"<script", page)) == 1


def test_without_evaluations_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no evaluations here"):
        write_checkpoint_report(written(tmp_path / "empty"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
