"""The page of a run says where it came from, folded away: files, code, machine and versions, whatever results hold."""

from pathlib import Path
from typing import Any

import pytest
from finished_run import make_run, results_of

from lit_recon.report.page import write_report
from lit_recon.report.provenance import MOST, Fact, provenance_facts

HASH = "0123456789abcdef" * 4
MARKUP = "<script>alert(1)</script>"
PROVENANCE: dict[str, Any] = {
    "model": {"name": "org/model", "revision": "c" * 40, "files": {"model.safetensors": HASH}},
    "text": {"a.txt": HASH, "b.txt": None},
    "samples": HASH,
    "masks": {},
    "modules": {MARKUP: HASH},
    "git": {
        "lit_recon": {"repository": "/code", "commit": "a" * 40, "dirty": False},
        "modules": [{"repository": "/own", "commit": None, "dirty": True}],
    },
    "code": HASH,
    "machine": {"device": "cpu", "CPU": "a CPU", "threads": "2"},
}


def test_what_is_known_is_said_by_what_it_is_about() -> None:
    assert provenance_facts(results_of(1) | {"provenance": PROVENANCE}) == {
        "Model": [
            *(Fact("name", "org/model"), Fact("revision", "c" * 40)),
            Fact("model.safetensors", "0123456789ab", HASH),
        ],
        "Text": [Fact("a.txt", "0123456789ab", HASH), Fact("b.txt", "gone"), Fact("all samples", "0123456789ab", HASH)],
        "Your modules": [Fact(MARKUP, "0123456789ab", HASH), Fact("git, /own", "without a commit, with changes")],
        "lit_recon": [Fact("git, /code", "a" * 12, "a" * 40), Fact("code", "0123456789ab", HASH)],
        "Machine": [Fact("device", "cpu"), Fact("CPU", "a CPU"), Fact("threads", "2")],
        "Versions": [Fact("lit_recon", "0.1.0"), Fact("torch", "2.13.0")],
    }


def test_of_many_files_the_first_are_named_and_the_others_counted() -> None:
    files = {f"{number}.txt": HASH for number in range(MOST + 1000)}
    lines = provenance_facts(results_of(1) | {"provenance": {"text": files}})["Text"]
    assert len(lines) == MOST + 1 and lines[-1] == Fact("more files", "1,000, in results.json")


@pytest.mark.parametrize(
    "found",
    [None, 3, "text", [], {"model": [], "git": {"modules": [1, {}], "lit_recon": 1}, "text": {"a": 1}, "code": {}}],
    ids=str,
)
def test_what_is_of_another_kind_is_left_out(found: Any) -> None:
    facts = provenance_facts(results_of(1) | {"provenance": found})
    assert set(facts) <= {"Versions", "Your modules"} and "Versions" in facts


def test_the_page_has_it_folded_away_and_runs_nothing_of_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", results_of(1) | {"provenance": PROVENANCE}, curves=False)
    text = " ".join(write_report(run).read_text(encoding="utf-8").split())
    section = text.partition("Where did it come from?")[2].partition("</section>")[0]
    assert '<details class="origin">' in section and "<details open" not in section
    assert f'<dt>model.safetensors</dt><dd title="{HASH}">0123456789ab</dd>' in section
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in section and text.count("<script") == 1
