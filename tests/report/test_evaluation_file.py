"""evaluations.json, read back: all of it, or what can be understood and a remark; and what the page shows of it."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from finished_run import in_units, make_run
from many_runs import MARKUP, SCRIPT, evaluations_of

from lit_recon.report.evaluations import latest, read_evaluations
from lit_recon.report.measures import ACCURACY, AGREEMENT, DIVERGENCE, measures
from lit_recon.report.page import write_report
from lit_recon.report.runs import read_run


def written(folder: Path, content: Any) -> Path:
    """The folder of a finished run with an evaluations.json."""
    run = make_run(folder, in_units(1), curves=False)
    (run / "evaluations.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return run


def test_the_newest_of_each_part_counts_and_unknown_keys_are_ignored(tmp_path: Path) -> None:
    content = evaluations_of("x")
    later = {"when": "later", "agreement": {"kl": 0.5, "unknown": 1}, "tasks": None, "another": {"key": []}}
    content["evaluations"].append(later)
    found, remarks = read_evaluations(written(tmp_path / "run", content | {"unknown": 3}))
    assert not remarks and [one.when for one in found] == ["2026-11-28T13:05:00+00:00", "later"]
    assert latest(found, "agreement")["kl"] == 0.5 and latest(found, "tasks")["mean"]["checkpoint"] == 0.625
    assert latest((), "tasks") is None


@pytest.mark.parametrize("content", ["{", "[]", '{"evaluations": 3}', "[" * 100_000, "\0"])
def test_a_damaged_file_is_one_remark_and_the_run_is_shown(tmp_path: Path, content: str) -> None:
    run = read_run(written(tmp_path / "run", content))
    assert run.state == "finished" and not run.evaluations
    (remark,) = run.remarks
    assert str(run.folder / "evaluations.json") in remark and "left out" in remark and "\n" not in remark


def test_a_part_that_is_not_understood_is_left_out_and_the_others_are_kept(tmp_path: Path) -> None:
    content = evaluations_of("x")
    content["evaluations"][0]["agreement"]["kl"] = "low"
    content["evaluations"].append("nothing")
    run = written(tmp_path / "run", content)
    found, (remark,) = read_evaluations(run)
    assert {"perplexity", "tasks", "continuations", "drift"} <= set(found[0].parts)
    assert "agreement" not in found[0].parts
    assert "evaluations[0].agreement.kl is 'low' instead of a number or null" in remark and "evaluations[1]" in remark
    page = write_report(run).read_text(encoding="utf-8")
    assert "instead of a number or null" in page and "62.5%" in page


def test_the_page_shows_all_parts_and_says_where_text_degenerates(tmp_path: Path) -> None:
    run = written(tmp_path / "run", evaluations_of(MARKUP + SCRIPT))
    page = " ".join(write_report(run).read_text(encoding="utf-8").split())
    for text in (
        "12.50",
        "75.0%",
        "context 2048",
        "0.0625 nats per token",
        "at 81.2% of 8,176 tokens",
        "lm-eval 0.4.9",
    ):
        assert text in page, text
    assert page.count("degenerates") == 1 and "This text degenerates: 87.5% of its word groups" in page
    assert "<img src=x" not in page and page.count("<script") == 1 and "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "stride None" not in page
    assert (run / "figures" / "hidden_states.png").exists() and (run / "figures" / "drift.png").exists()
    assert page.count('<img src="data:image/png;base64,') == len(list((run / "figures").iterdir()))


def test_what_evaluations_measured_is_compared_between_runs(tmp_path: Path) -> None:
    run = read_run(written(tmp_path / "run", evaluations_of("x")))
    assert (ACCURACY.of(run), DIVERGENCE.of(run), AGREEMENT.of(run)) == (0.625, 0.0625, 0.8125)
    keys = [measure.key for measure in measures([run])]
    assert keys[-3:] == ["tasks_mean", "kl_nats_per_token", "top1_agreement"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_no_content_ends_a_report(tmp_path: Path, count: int) -> None:
    draw = random.Random(1)
    others = (None, True, "text", "", -1, 0, 1e308, 10**400, float("nan"), float("inf"), [], [1], {}, {"a": [1]})
    run = written(tmp_path / "run", "{}")
    for _ in range(count):
        content = copy.deepcopy(evaluations_of("x"))
        within: Any = content["evaluations"][0]
        while True:  # to any place in it
            key = draw.choice(list(within) if isinstance(within, dict) else range(len(within)))
            if not isinstance(within[key], (dict, list)) or not within[key] or draw.random() < 0.3:
                break
            within = within[key]
        within[key] = draw.choice(others)
        (run / "evaluations.json").write_text(json.dumps(content), encoding="utf-8")
        (run / "report.html").unlink(missing_ok=True)
        assert write_report(run).stat().st_size > 50_000
