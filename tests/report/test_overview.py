"""The page over many runs, its figures and its tables, and the command that writes them."""

import csv
import html
import re
from pathlib import Path

import pytest
from finished_run import make_run
from many_runs import MARKUP, configure, make_many, results_of_setting

from lit_recon.report import page
from lit_recon.report.__main__ import main
from lit_recon.report.overview import write_overview
from lit_recon.report.runs import read_runs


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command without the pages of single runs, which take seconds."""
    monkeypatch.setattr(page, "write_report", lambda run, out: run)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the page over a sweep, with a failed run and one whose name is markup."""
    folder = tmp_path_factory.mktemp("runs")
    runs = make_many(folder, (1e-3, 3e-4), (8, 32), (0, 1))
    odd = make_run(folder / MARKUP, results_of_setting(1e-3, 128, 0), curves=False)
    configure(odd, samples=128)
    (odd / "report.html").write_text("", encoding="utf-8")
    configure(folder / "failed", rate=1e-2)
    out = folder / "out" / "deep"
    assert write_overview(read_runs([*runs, odd, folder / "failed", folder / "nowhere"]), out) == out / "report.html"
    return out


def test_the_page_lists_every_run_by_its_state_with_what_is_known_of_it(drawn: Path) -> None:
    text = (drawn / "report.html").read_text(encoding="utf-8")
    assert re.search(r"<h1>10 runs in runs\d*</h1>", text) and "9 finished, 1 failed" in text
    with (drawn / "runs.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert len(rows) == 10 and rows["failed"]["state"] == "failed"
    assert rows["failed"]["module.optimizer.lr"] == "0.01" and rows["failed"]["perplexity_reconstructed"] == ""
    one = rows["lr0.0003_n32_s1"]
    # 16 + 40 / sqrt(32) + 0 + 0.05, as the run was made
    assert float(one["perplexity_reconstructed"]) == pytest.approx(16 + 40 / 32**0.5 + 0.05)
    assert one["data.num_samples"] == "32" and one["calibration_tokens"] == "8192.0"
    assert "it ended before its first window" in text and "nowhere: not a folder" in text


def test_runs_of_another_model_or_text_have_no_part_in_what_compares_perplexities(tmp_path: Path) -> None:
    runs = make_many(tmp_path, (1e-3,), (8, 32), (0,))
    small, other = results_of_setting(1e-3, 128, 0), results_of_setting(1e-3, 128, 0)
    small["model"] |= {"name": "another-model"}
    other["protocol"] |= {"dataset": "another text"}
    runs += [make_run(tmp_path / "small", small, curves=False), make_run(tmp_path / "other", other, curves=False)]
    for run in runs:
        if not (run / "config.yaml").exists():
            configure(run)
    text = write_overview(read_runs(runs), tmp_path / "out").read_text(encoding="utf-8")
    assert "2 of the runs are of another model or evaluation text than most" in text
    said = re.search(r"lowest perplexity of a reconstructed model\s+is ([\d.]+), of ([\w.]+)", text)
    assert said and said[2] == "lr0.001_n32_s0.", "not of 128 samples, which are of another model or text"
    assert "perplexity on" in text and "another text" in text


def test_groups_are_the_settings_and_hold_the_seeds(drawn: Path) -> None:
    with (drawn / "groups.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["data.num_samples"], row["module.optimizer.lr"], row["finished"], row["runs"]) for row in rows] == [
        *(("8", "0.0003", "2", "2"), ("8", "0.001", "2", "2"), ("32", "0.0003", "2", "2"), ("32", "0.001", "2", "2")),
        *(("32", "0.01", "0", "1"), ("128", "0.001", "1", "1")),
    ]
    # two seeds, 0.05 apart: their standard deviation is 0.05 / sqrt(2)
    assert float(rows[0]["perplexity_reconstructed_standard_deviation"]) == pytest.approx(0.05 / 2**0.5)


def test_both_choices_of_a_rate_are_named(drawn: Path) -> None:
    text = " ".join((drawn / "report.html").read_text(encoding="utf-8").split())
    section = text.partition("Which learning rate?")[2].partition("</section>")[0]
    rows = re.findall(r"<tr> <td.*?</tr>", section)
    found = [[html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]
    expected = [
        [f"data.num_samples {samples}", *choice]
        for samples in (8, 32)
        for choice in (
            ["chosen by held-out error", "0.001"],
            ["chosen by test perplexity (the paper's rule)", "0.0003"],
        )
    ]
    assert [row[:3] for row in found] == expected
    with (drawn / "rates.csv").open(newline="", encoding="utf-8") as file:
        in_csv = list(csv.DictReader(file))
    assert [[row["sweep"], row["rule"], row["rate"]] for row in in_csv] == expected
    assert float(in_csv[0]["perplexity_reconstructed_standard_deviation"]) == pytest.approx(0.05 / 2**0.5)
    in_markdown = (drawn / "rates.md").read_text(encoding="utf-8")
    assert "| data.num_samples 8 | chosen by held-out error | 0.001 |" in in_markdown


def test_every_table_of_the_page_is_a_file_next_to_it_in_two_forms(tmp_path: Path) -> None:
    runs = make_many(tmp_path, (1e-3, 3e-4), (8,), (0, 1))
    for name, changes in (("magnitude", {"criterion": "Magnitude"}), ("half", {"windows": "half"})):
        results = results_of_setting(1e-3, 8, 0)
        results["recipe"] |= changes
        results["perplexity"] |= {"pruned": 40.0, "reconstructed": 25.0}
        runs.append(make_run(tmp_path / name, results, curves=False))
        configure(runs[-1], samples=8, by=f"{name}.{name}")
    page = write_overview(read_runs(runs), tmp_path / "out")
    names = ("criteria_1", "groups", "rates", "runs", "windows")
    found = sorted(path.name for path in page.parent.iterdir() if path.suffix in (".csv", ".md"))
    assert found == sorted(f"{name}.{kind}" for name in names for kind in ("csv", "md"))
    text = page.read_text(encoding="utf-8")
    assert text.count('<table class="sortable') == len(names)
    for name in found:
        assert f'<a href="{name}">{name}</a>' in text
    with (page.parent / "criteria_1.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["spread_between_criteria"]: row for row in csv.DictReader(file)}
    spread = rows["range, perplexity"]  # of 22.3456 and 40.0
    assert float(spread["pruned"]) == pytest.approx(40 - 22.3456)
    assert float(spread["left"]) == pytest.approx(float(spread["reconstructed"]) / float(spread["pruned"]))
    with (page.parent / "windows.csv").open(newline="", encoding="utf-8") as file:
        assert [(row["windows"], row["finished"]) for row in csv.DictReader(file)] == [("half", "1"), ("block", "5")]


def test_figures_are_on_the_page_and_beside_it(drawn: Path) -> None:
    text = (drawn / "report.html").read_text(encoding="utf-8")
    names = {path.stem for path in (drawn / "figures").iterdir()}
    costs = ("calibration_tokens", "total_seconds", "walk_peak_memory_gb")
    over = {"over_data_num_samples", "over_module_optimizer_lr"}
    assert names == {
        "groups",
        *over,
        *(f"pareto_{quality}_{cost}" for quality in ("perplexity", "nats") for cost in costs),
    }
    assert text.count('<img src="data:image/png;base64,') == len(names) == text.count("<img")
    assert all(path.stat().st_size > 2000 for path in (drawn / "figures").iterdir())


def test_names_are_no_markup_and_links_lead_to_the_pages_of_runs(drawn: Path) -> None:
    text = (drawn / "report.html").read_text(encoding="utf-8")
    assert MARKUP not in text and "&lt;img src=x onerror=alert(1)&gt;" in text
    assert 'href="../../%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E/report.html"' in text
    assert text.count("<script>") == 1 and "://" not in text


def test_a_folder_whose_name_is_a_scheme_is_not_one_in_a_link(tmp_path: Path) -> None:
    runs = make_many(tmp_path, (1e-3,), (8,), (0,))
    odd = make_run(tmp_path / "javascript:alert(1)", results_of_setting(1e-3, 8, 0), curves=False)
    (odd / "report.html").write_text("", encoding="utf-8")
    text = write_overview(read_runs([*runs, odd]), tmp_path).read_text(encoding="utf-8")
    assert 'href="javascript%3Aalert%281%29/report.html"' in text and 'href="javascript:' not in text


def test_the_command_writes_it_beside_the_runs_or_where_it_is_told_and_groups_as_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(run) for run in make_many(tmp_path / "runs", (1e-3, 3e-4), (8,), (0,))]
    assert main(runs) == 0
    assert capsys.readouterr().out.endswith(f"Report: {tmp_path}/runs/report/report.html\n")
    assert main([*runs, str(tmp_path / "runs" / "report"), "--markdown"]) == 0, "runs/* matches the report by now"
    assert "Report" not in capsys.readouterr().out
    assert main([*runs, "--out", str(tmp_path / "out"), "--group", "data.num_samples,criterion"]) == 0
    assert (tmp_path / "out" / "groups.csv").read_text().startswith("data.num_samples,criterion._target_,finished,runs")


def test_an_unknown_key_and_a_folder_of_a_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(run) for run in make_many(tmp_path, (1e-3, 3e-4), (8,), (0,))]
    with pytest.raises(SystemExit) as stopped:
        main([*runs, "--group", "data.samples"])
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("--group data.samples: no run has this key")
    assert main([*runs, "--out", runs[0]]) == 2
    assert "this is the folder of a run" in capsys.readouterr().err
    assert not (Path(runs[0]) / "runs.csv").exists()
