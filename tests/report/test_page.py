"""Reports of hand-written runs: the figures, the page, the comparison on the command line."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lit_recon.report.figures import error_over_depth, learning_curves, read_curves, read_results, write_figures
from lit_recon.report.page import COLUMNS, as_error, as_perplexity, main, sparsity_by_kind, verdict, write_report
from lit_recon.system.units import duration

STEPS = 16
FIGURES = ["perplexity", "error_over_depth", "learning_curves", "time"]
REFUSED = {"accepted": False, "held_out_after": 0.0333, "note": "loss was not finite; pruned weights kept"}


def results_of(num_windows: int) -> dict[str, Any]:
    """A results.json as lit_recon.fit.__main__ writes it; errors grow with depth and are halved by reconstruction."""
    matrices = ["self_attn.q_proj", "mlp.down_proj"]
    return {
        "perplexity": {"dense": 14.9012, "pruned": 22.3456, "reconstructed": 17.2987},
        "gap_recovered": 0.677941,
        "protocol": {"dataset": "python_docs", "split": "evaluation", "context": 512, "windows": 16, "tokens": 8176},
        "model": {"name": "tiny-llama", "parameters": 134515008, "prunable_parameters": 106168320, "covered": 0.78926},
        "recipe": {"criterion": "Wanda", "pattern": "unstructured 50% per row", "windows": "block", "inputs": "dense"},
        "sparsity": {
            "total": 0.39462,
            "prunable": 0.5,
            "by_matrix": {f"model.layers.{i}.{m}.weight": 0.5 for i in range(num_windows) for m in matrices},
        },
        "windows": [
            {
                "name": f"block_{index:02}",
                "relative_error_before": 0.01 * (index + 1),
                "relative_error_after": 0.004 * (index + 1),
                "held_out_before": 0.011 * (index + 1),
                "held_out_after": 0.0055 * (index + 1),
                "accepted": True,
                "steps": STEPS,
                "seconds": 1.4,
                "note": "",
            }
            for index in range(num_windows)
        ],
        "seconds": {
            "load": 3.2,
            "teacher": 9.0,
            "prune": 1.0,
            "fit": 30.1,
            "advance": 0.5,
            "commit": 0.4,
            "evaluate": 22.0,
            "total": 71.04,
        },
        "peak_memory_bytes": 1512345678,
        "tokens": {"calibration": 8192},
        "versions": {"lit_recon": "0.1.0", "torch": "2.13.0"},
        "seed": 7,
    }


def make_run(folder: Path, results: dict[str, Any], *, curves: bool = True) -> Path:
    """The folder of a run with these results, and with training curves that fall from window to window."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "config.yaml").write_text("seed: 7\n", encoding="utf-8")
    if curves:
        with SummaryWriter(str(folder / "tensorboard")) as writer:
            for index, window in enumerate(results["windows"]):
                for step in range(STEPS):
                    loss = window["held_out_before"] * 0.95**step
                    writer.add_scalar(f"{window['name']}/loss/train", loss, index * STEPS + step)
                    if step in (0, STEPS - 1):
                        writer.add_scalar(f"{window['name']}/loss/held_out", 1.1 * loss, index * STEPS + step)
                writer.add_scalar("depth/held_out_before", window["held_out_before"], index)
    return folder


@pytest.fixture
def two_windows(tmp_path: Path) -> Path:
    """A run of two windows, the second of which was refused."""
    results = results_of(2)
    results["windows"][1] |= REFUSED
    return make_run(tmp_path / "two", results)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with its report."""
    results = results_of(2)
    results["windows"][1] |= REFUSED
    run = make_run(tmp_path_factory.mktemp("runs") / "two", results)
    assert write_report(run) == run / "report.html"
    return run


@pytest.fixture
def page(reported: Path) -> str:
    """That report."""
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


@pytest.mark.parametrize("num_windows", [2, 30, 100])
def test_every_figure_is_a_readable_png_with_content(tmp_path: Path, num_windows: int) -> None:
    run = make_run(tmp_path / "run", results_of(num_windows))
    paths = write_figures(run)
    assert paths == [run / "figures" / f"{name}.png" for name in FIGURES]
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width == 1500 and image.height > 150
            colors = image.convert("RGB").getcolors(maxcolors=1 << 24)
        background = max(count for count, _ in colors)
        assert len(colors) > 20 and background < 0.97 * 1500 * image.height
    assert sum(path.stat().st_size for path in paths) < 300_000


def test_the_depth_figure_shows_the_held_out_errors_before_and_after() -> None:
    upper, lower = error_over_depth(results_of(3)["windows"]).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in upper.lines}
    assert lines["pruned"] == pytest.approx([0.011, 0.022, 0.033])
    assert lines["reconstructed"] == pytest.approx([0.0055, 0.011, 0.0165])
    left = {line.get_label(): list(line.get_ydata()) for line in lower.lines}
    assert left["held-out"] == pytest.approx([0.5] * 3) and left["calibration"] == pytest.approx([0.4] * 3)
    assert upper.get_yscale() == "log" and lower.get_ylim()[0] == 0


def test_each_window_has_its_own_column_in_the_learning_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", results_of(30))
    figure = learning_curves(read_results(run)["windows"], read_curves(run))
    assert figure is not None
    train = [line for line in figure.axes[0].lines if len(line.get_xdata()) == STEPS]
    held_out = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert len(train) == len(held_out) == 30
    for index in range(30):
        start, end = held_out[index].get_xdata()
        assert index - 0.5 < start < end < index + 0.5
        assert train[index].get_xdata()[[0, -1]] == pytest.approx([start, end])
        assert train[index].get_ydata()[0] == pytest.approx(0.011 * (index + 1))


def test_a_window_with_one_logged_point_has_it_at_the_end_of_its_column() -> None:
    windows = results_of(2)["windows"]
    figure = learning_curves(windows, {"block_01/loss/held_out": [(31, 0.02)]})
    assert figure is not None
    (line,) = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert line.get_xdata() == pytest.approx([1.4]) and line.get_marker() == "o"


def test_of_two_attempts_at_a_window_the_second_is_drawn() -> None:
    first, second = [(0, 0.9), (1, float("nan"))], [(0, 0.5), (1, 0.4), (2, 0.3)]
    figure = learning_curves(results_of(1)["windows"], {"block_00/loss/train": first + second})
    assert figure is not None
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.5, 0.4, 0.3]


def test_no_point_of_the_curves_is_dropped(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for step in range(10_050):  # more than TensorBoard keeps by default
            writer.add_scalar("block_00/loss/train", step, step)
        for depth in range(3):  # a second x axis, which starts again at zero
            writer.add_scalar("depth/held_out_before", depth / 4, depth)
    curves = read_curves(tmp_path)
    assert curves["block_00/loss/train"] == [(step, step) for step in range(10_050)]
    assert curves["depth/held_out_before"] == [(0, 0.0), (1, 0.25), (2, 0.5)]


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
    assert not references.tags & {"script", "link", "iframe", "object"}
    assert "url(" not in page and "@import" not in page and "://" not in page
    assert references.links and all((reported / link).exists() for link in references.links)


def test_the_page_shows_how_to_load_the_checkpoint_and_open_the_curves(page: str, reported: Path) -> None:
    folder = reported.resolve().as_posix()
    assert f"AutoModelForCausalLM.from_pretrained(&#34;{folder}/checkpoint&#34;)" in page
    assert f"AutoTokenizer.from_pretrained(&#34;{folder}/checkpoint&#34;)" in page
    assert f"tensorboard --logdir {folder}/tensorboard" in page


def test_names_and_notes_are_escaped(tmp_path: Path) -> None:
    results = results_of(2)
    results["model"]["name"] = "<script>alert(1)</script>"
    results["windows"][0] |= {"name": "<i>$x$ & co", "note": "<b>bold</b>"}
    page = write_report(make_run(tmp_path / "a&b", results)).read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script" not in page
    assert "&lt;i&gt;$x$ &amp; co" in page and "<i>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page and "<b>" not in page
    assert "<h1>a&amp;b</h1>" in page


def test_without_curves_the_page_says_so_and_has_the_other_figures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", results_of(2), curves=False)
    page = write_report(run).read_text(encoding="utf-8")
    assert "This run has no training curves" in page
    assert sorted(path.stem for path in (run / "figures").iterdir()) == ["error_over_depth", "perplexity", "time"]
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(0), "0.0 s"),
        (duration(99.94), "99.9 s"),
        (duration(99.96), "1 min 40 s"),
        (duration(125.4), "2 min 05 s"),
        (duration(3599.6), "1 h 00 min"),
        (duration(11400), "3 h 10 min"),
        (as_perplexity(123456.7), "123,456.70"),
        (as_perplexity(float("inf")), "not finite"),
        (as_error(0.0123456), "0.0123"),
        (as_error(0.00001234), "1.23e-05"),
    ],
)
def test_numbers_read_well(text: str, expected: str) -> None:
    assert text == expected


NEW = {  # what runs of earlier versions lack
    "relative_error": {"pruned": 0.345678, "reconstructed": 0.123456},
    "walk_peak_memory_bytes": 987_654_321,
    "predicted": {"seconds": 65.43, "peak_memory_bytes": 1_400_000_000, "walk_peak_memory_bytes": 1_050_000_000},
}


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


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": "60"}])  # pipe, terminal
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


def test_markdown_shows_names_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = results_of(1)
    results["recipe"]["windows"] = "a|b <i>*c*"
    main([str(make_run(tmp_path / "x|y", results)), "--markdown"])
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith("| x\\|y | a\\|b \\<i>\\*c\\* | 14.90 |")
    assert row.replace("\\|", "").count("|") == len(COLUMNS) + 1


def test_rows_tell_every_setting_in_which_runs_differ_and_no_other(
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


def test_the_page_has_what_newer_runs_measure(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run", results_of(2) | NEW)).read_text(encoding="utf-8")
    page = " ".join(page.split())
    assert "Of the last layer's hidden states it is 0.346 after pruning and 0.123 after reconstruction." in page
    assert "at the peak, 0.99 GB while windows were reconstructed; predicted were 65.4 s and 1.40 GB." in page


def test_errors_that_are_no_relative_errors_are_not_called_so(tmp_path: Path) -> None:
    results = results_of(2)
    results["windows"][0]["measure"], results["windows"][1]["measure"] = "relative error", "KL divergence"
    assert error_over_depth(results["windows"][:1]).axes[0].get_ylabel() == "held-out relative error"
    assert error_over_depth(results["windows"][1:]).axes[0].get_ylabel() == "held-out KL divergence"
    assert error_over_depth(results["windows"]).axes[0].get_ylabel() == "held-out error"
    page = write_report(make_run(tmp_path / "run", results)).read_text(encoding="utf-8")
    assert "where the loss was on the logits, their KL divergence in nats per token" in page


def test_a_folder_that_is_no_run_gets_one_message_and_exit_status_2(two_windows: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    runs = [str(two_windows), str(tmp_path / "empty"), str(tmp_path / "nowhere")]
    done = subprocess.run(
        [sys.executable, "-m", "lit_recon.report", *runs],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2 and done.stdout == ""
    expected = "expected the folder of a finished run, with its results.json in it."
    assert done.stderr.splitlines() == [
        f"{runs[1]}: no results.json here; {expected}",
        f"{runs[2]}: not a folder; {expected}",
    ]
    assert not (two_windows / "report.html").exists(), "nothing is rewritten if one of the folders is wrong"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "without perplexity, gap_recovered"),
        ('{"perplexity": {}}', "without gap_recovered, protocol"),
    ],
)
def test_a_results_file_of_something_else_is_refused(
    content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert words in message and str(tmp_path / "results.json") in message and message.count("\n") == 1


def test_a_report_that_cannot_be_written_gets_one_message(
    two_windows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (two_windows / "figures").write_text("in the way", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main([str(two_windows)])
    assert stopped.value.code == 2
    assert "the report cannot be written" in capsys.readouterr().err
