"""The page of a run: every number and remark, nothing from elsewhere."""

import base64
import csv
import hashlib
import html
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from finished_run import NEW, REFUSED, in_units, make_run, results_of

from lit_recon.report import templates
from lit_recon.report.__main__ import main
from lit_recon.report.figures import error_over_depth
from lit_recon.report.page import sparsity_by_kind, tries, verdict, write_report

FIGURES = ["perplexity", "error_over_depth", "learning_curves", "time", "memory", "sparsity"]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two windows, the second of which was refused, with its report."""
    results = results_of(2)
    results["windows"][1] |= REFUSED
    run = make_run(tmp_path_factory.mktemp("runs") / "two", results)
    assert write_report(run) == run / "report.html"
    return run


@pytest.fixture
def page(reported: Path) -> str:
    """The report of that run."""
    return (reported / "report.html").read_text(encoding="utf-8")


class References(HTMLParser):
    """Everything that a page refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect one tag."""
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset", "data", "poster")]
        self.links += [value or "" for name, value in attrs if name == "href"]


def test_the_page_has_the_numbers_rounded_as_people_read_them(page: str) -> None:
    for text in ("14.90", "22.35", "17.30", "67.8%", "50.0%", "39.5% of all parameters", "1 of 2", "1.51 GB"):
        assert f">{text}<" in page, text
    for text in (
        "71.0 s",
        "134.5 M",
        "106.2 M",
        "78.9%",
        "8,192",
        "8,176",
        "0.0110",
        "0.00550",
        "Seed 7",
        "torch 2.13.0",
    ):
        assert text in page, text
    assert "Reconstruction recovered 67.8% of the perplexity that pruning had cost." in page


def test_the_page_names_the_refused_window_and_its_note(page: str) -> None:
    remarks = page[page.index("What needs a look") : page.index("Where along the depth")]
    assert "block_01" in remarks and "not accepted" in remarks and REFUSED["note"] in remarks
    assert "block_00" not in remarks


def test_a_note_of_an_accepted_window_is_shown(tmp_path: Path) -> None:
    results = results_of(30)
    results["windows"][4]["note"] = "loss was not finite; learning rate halved"
    page = write_report(make_run(tmp_path / "run", results)).read_text(encoding="utf-8")
    remarks = page[page.index("What needs a look") : page.index("Where along the depth")]
    assert "block_04" in remarks and "learning rate halved" in remarks and "not accepted<" not in remarks


def test_the_page_says_so_when_nothing_needs_a_look(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run", results_of(2))).read_text(encoding="utf-8")
    assert "Nothing: every window was accepted" in page


def test_the_page_needs_no_other_file_and_no_network(page: str, reported: Path) -> None:
    references = References(page)
    images = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in references.sources]
    assert images == [(reported / "figures" / f"{name}.png").read_bytes() for name in FIGURES]
    assert not references.tags & {"link", "iframe", "object"} and page.count("<script") == 1
    assert "url(" not in page and "@import" not in page and "://" not in page
    assert references.links and all((reported / link).exists() for link in references.links)


def test_the_page_shows_how_to_load_the_checkpoint_and_open_the_curves(page: str, reported: Path) -> None:
    folder = reported.resolve().as_posix()
    assert f"AutoModelForCausalLM.from_pretrained(&#34;{folder}/checkpoint&#34;)" in page
    assert f"AutoTokenizer.from_pretrained(&#34;{folder}/checkpoint&#34;)" in page
    assert f"tensorboard --logdir {folder}/tensorboard" in page


def test_the_page_may_request_nothing_and_run_no_script_but_the_one_that_sorts(page: str) -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    directives = dict(part.split(" ", 1) for part in html.unescape(policy[1]).split("; "))
    assert directives["default-src"] == "'none'" and directives["img-src"] == "data:"
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert directives["style-src"] == f"'sha256-{digest}'"
    script = (Path(templates.__file__).parent / "sort.js").read_text(encoding="utf-8")
    assert page.count(f"<script>{script}</script>") == 1
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert directives["script-src"] == f"'sha256-{digest}'"


def test_names_and_notes_are_escaped(tmp_path: Path) -> None:
    results = results_of(2)
    results["model"]["name"] = "<script>alert(1)</script>"
    results["windows"][0] |= {"name": "<i>$x$ & co", "note": "<b>bold</b>"}
    page = write_report(make_run(tmp_path / "a&b", results)).read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and page.count("<script") == 1
    assert "&lt;i&gt;$x$ &amp; co" in page and "<i>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page and "<b>" not in page
    assert "<h1>a&amp;b</h1>" in page


def test_without_curves_the_page_says_so_and_has_the_other_figures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", results_of(2), curves=False)
    page = write_report(run).read_text(encoding="utf-8")
    assert "This run has no training curves" in page
    assert sorted(path.stem for path in (run / "figures").iterdir()) == sorted({*FIGURES} - {"learning_curves"})
    assert "tensorboard/</a>" not in page


@pytest.mark.filterwarnings("error")
def test_a_run_whose_model_broke_or_lost_nothing_still_has_a_report(tmp_path: Path) -> None:
    results = results_of(3)
    results["perplexity"] |= {"pruned": float("inf"), "reconstructed": float("nan")}
    results["gap_recovered"] = float("nan")
    results["windows"][1] |= {"held_out_before": float("inf"), "held_out_after": None}
    page = write_report(make_run(tmp_path / "broken", results)).read_text(encoding="utf-8")
    assert "A model broke: perplexity not finite after pruning" in page and ">–<" in page
    results = results_of(2)
    for window in results["windows"]:
        window |= dict.fromkeys(("held_out_before", "held_out_after"), 0.0)
        window |= dict.fromkeys(("relative_error_before", "relative_error_after"), 0.0)
    page = write_report(make_run(tmp_path / "dense", results)).read_text(encoding="utf-8")
    assert ">0.00<" in page


@pytest.mark.parametrize(
    ("gap", "kind", "words"),
    [
        (0.0004, "good", "recovered 0.0%"),
        (-0.4, "bad", "did not help: perplexity 22.35 after pruning, 17.30 after"),
        (None, "neutral", "no gap to recover"),
    ],
)
def test_the_verdict_follows_the_recovered_share(gap: float | None, kind: str, words: str) -> None:
    answer = verdict(results_of(1) | {"gap_recovered": gap})
    assert answer[0] == kind and words in answer[1]


def test_no_success_is_claimed_where_pruning_cost_nothing() -> None:
    perplexity = {"dense": 14.9, "pruned": 14.8, "reconstructed": 14.7}
    assert verdict({"perplexity": perplexity, "gap_recovered": 1.0})[0] == "neutral"


def test_matrices_of_one_kind_are_together_over_layers_and_experts() -> None:
    by_matrix = {
        "model.layers.0.self_attn.q_proj.weight": 0.25,
        "model.layers.11.self_attn.q_proj.weight": 0.75,
        "model.layers.0.mlp.experts.3.w1.weight": 0.5,
        "model.layers.0.mlp.experts.14.w1.weight": 0.6,
        "model.layers.0.mlp.experts.gate_up_proj": 0.1,
    }
    assert sparsity_by_kind(by_matrix) == {
        "self_attn.q_proj": [0.25, 0.75],
        "mlp.experts.*.w1": [0.5, 0.6],
        "mlp.experts.gate_up_proj": [0.1],
    }


def test_the_page_has_what_newer_runs_measure(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run", results_of(2) | NEW)).read_text(encoding="utf-8")
    page = " ".join(page.split())
    assert "Of the last layer's hidden states it is 0.346 after pruning and 0.123 after reconstruction." in page
    assert "error of a window's output over the variance of its target, on samples" in page and "typical" not in page
    assert "at the peak, 0.99 GB while windows were reconstructed; predicted were 65.4 s and 1.40 GB." in page
    phases = page.partition("Time and memory of each phase as a table")[2].partition("</table>")[0]
    rows = [re.findall("<td[^>]*>(.*?)</td>", row) for row in phases.split("<tr>")]
    # 9.0 of 71.04 s is 12.7%; of pruning no peak is known
    assert ["teacher", "9.0 s", "12.7%", "0.75 GB"] in rows and ["prune", "1.0 s", "1.4%", "–"] in rows
    assert ["total", "71.0 s", "100.0%", "1.51 GB"] in rows


def rows_of(page: str) -> list[list[str]]:
    """The table of every window, as text of its cells."""
    table = page.partition("<h2>Every window</h2>")[2].partition("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    cells = [re.findall(r"<t[hd][ >].*?</t[hd]>", row, re.DOTALL) for row in rows]
    return [[re.sub(r"<[^>]*>", "", cell).strip() for cell in row] for row in cells]


def test_the_page_shows_the_typical_token_and_the_rate_of_each_window(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run", in_units(2), curves=False)).read_text(encoding="utf-8")
    header, first, second = rows_of(page)
    found = dict(zip(header, first, strict=True))
    assert (found["held-out before"], found["held-out after"]) == ("0.0110", "0.00550")
    assert (found["typical before"], found["typical after"]) == ("0.00900", "0.00270")
    assert (found["rate"], found["tries"]) == ("0.5", "2")
    assert dict(zip(header, second, strict=True))["tries"] == "1"
    said = " ".join(page.split())
    assert "in units of the median energy of its dense update (output minus input; of a single matrix its" in said
    assert "0.123 after reconstruction (0.235 and 0.0988 at a typical token), in units of the median energy" in said
    assert "variance" not in said
    old = write_report(make_run(tmp_path / "old", results_of(1), curves=False)).read_text(encoding="utf-8")
    assert not {"typical before", "rate", "tries"} & set(rows_of(old)[0])


@pytest.mark.parametrize(
    ("rate", "tried", "shown"),
    [
        (1.0, [[1.0, 0.5, 0.5]], []),
        (0.0, [[0.0, 0.5, 0.5]], []),  # solved for, not trained
        (1.0, [[0.0, 0.5, 0.5], [1.0, 0.4, 0.4]], []),
        (2.0, [[2.0, 0.5, 0.5]], [1]),
        (1.0, [[1.0, 0.4, 0.4], [0.5, None, 0.5]], [2]),
    ],
    ids=["once", "solved", "solved and trained", "once at another rate", "twice"],
)
def test_tries_are_shown_where_a_window_was_tried_again_or_at_another_rate(
    rate: float, tried: list, shown: list[int]
) -> None:
    assert tries([{"rate": rate, "tries": tried}]) == shown


def test_errors_that_are_no_relative_errors_are_not_called_so(tmp_path: Path) -> None:
    results = results_of(2)
    results["windows"][0]["measure"], results["windows"][1]["measure"] = "relative error", "KL divergence"
    assert error_over_depth(results["windows"][:1]).axes[0].get_ylabel() == "held-out relative error"
    assert error_over_depth(results["windows"][1:]).axes[0].get_ylabel() == "held-out KL divergence"
    assert error_over_depth(results["windows"]).axes[0].get_ylabel() == "held-out error"
    page = write_report(make_run(tmp_path / "run", results)).read_text(encoding="utf-8")
    assert "where the loss was on the logits, their KL divergence in nats per token" in page


def test_names_that_are_not_utf_8_are_shown_as_escapes(tmp_path: Path) -> None:
    results = results_of(1)
    results["model"]["name"] = "caf\udce9"
    run = make_run(tmp_path / "run", results, curves=False)
    (run / "config.yaml").write_bytes(b"name: caf\xe9\n")
    page = write_report(run).read_text(encoding="utf-8")
    assert "caf\\udce9" in page and "name: caf\N{REPLACEMENT CHARACTER}" in page


def test_a_page_elsewhere_leaves_the_run_as_it_was_links_to_its_files_and_has_its_tables_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = in_units(2)
    results["windows"][1] |= REFUSED | {"note": "=1+1"}
    run = make_run(tmp_path / "a run", results, curves=False)
    before = sorted(path.name for path in run.iterdir())
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in run.iterdir()) == before
    page = References((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "../a%20run/results.json" in page.links and all(
        (tmp_path / "out" / unquote(link)).exists() for link in page.links
    )
    with (tmp_path / "out" / "windows.csv").open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert (first["window"], first["held_out_before"], first["accepted"]) == ("block_00", "0.011", "accepted")
    assert (second["accepted"], second["note"]) == ("not accepted", "'=1+1")
    assert (tmp_path / "out" / "windows.md").read_text(encoding="utf-8").startswith("| window | held-out before |")
    with (tmp_path / "out" / "phases.csv").open(newline="", encoding="utf-8") as file:
        phases = {row["phase"]: row for row in csv.DictReader(file)}
    assert (phases["fit"]["seconds"], phases["fit"]["peak_memory_bytes"]) == ("30.1", "987654321.0")
    assert phases["prune"]["peak_memory_bytes"] == "" and phases["total"]["peak_memory_bytes"] == "1512345678.0"
    assert "| fit | 30.1 s | 42.4% | 0.99 GB |" in (tmp_path / "out" / "phases.md").read_text(encoding="utf-8")
