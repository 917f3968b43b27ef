"""Studies of the criterion: which runs belong together, their spread, and the figure beside them."""

import math
from pathlib import Path
from typing import Any

import pytest
from finished_run import in_units, make_run
from matplotlib.figure import Figure
from PIL import Image

from lit_recon.report import overview, page
from lit_recon.report.__main__ import main
from lit_recon.report.run_files import read_results
from lit_recon.report.study import Study, studies
from lit_recon.report.study_figure import criteria

DENSE = 10.0
PERPLEXITIES = {"magnitude": (80.0, 48.0), "wanda": (40.0, 24.0), "swaps": (20.0, 12.0)}  # all gain log(5 / 3) nats
RECIPES = {"magnitude": {"criterion": "Magnitude"}, "wanda": {}, "swaps": {"refine": "Swaps"}}  # of Wanda
ABOUT = (
    "tiny-llama, unstructured 50% per row, 8,192 calibration tokens, perplexity on python_docs, 16 x 512 tokens, block"
)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command without pages, which take seconds."""
    monkeypatch.setattr(page, "write_report", lambda run, out: run)
    monkeypatch.setattr(overview, "write_overview", lambda runs, out, keys: runs[0].folder)


def results_by(case: str, **more: Any) -> dict[str, Any]:
    """results.json of a run by a criterion."""
    pruned, reconstructed = PERPLEXITIES[case]
    results = in_units(1) | {"perplexity": {"dense": DENSE, "pruned": pruned, "reconstructed": reconstructed}} | more
    return results | {"recipe": results["recipe"] | RECIPES[case]}


def make_runs(folder: Path, prefix: str = "", **more: Any) -> list[Path]:
    """The folders of a study's runs."""
    return [make_run(folder / f"{prefix}{case}", results_by(case, **more), curves=False) for case in PERPLEXITIES]


def found(*runs: Path) -> list[Study]:
    """Studies among runs."""
    return studies({run: read_results(run) for run in runs})


def test_where_all_gain_as_many_nats_the_spread_in_nats_stays_though_that_in_perplexity_shrinks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_runs(Path("runs/criteria/tiny"))
    assert main(["--markdown", *(f"runs/criteria/tiny/{case}" for case in PERPLEXITIES)]) == 0
    # Of log 2, 2 log 2 and 3 log 2 the range is 2 log 2, the standard deviation log 2 * sqrt(2 / 3).
    assert capsys.readouterr().out.splitlines()[5:] == [
        "",
        ABOUT,
        "",
        "| spread between criteria, 3 runs | pruned | reconstructed | left |",
        "| --- | ---: | ---: | ---: |",
        "| range, perplexity | 60.00 | 36.00 | 60.0% |",
        "| standard deviation, perplexity | 24.94 | 14.97 | 60.0% |",
        "| range, nats | 1.386 | 1.386 | 100.0% |",
        "| standard deviation, nats | 0.566 | 0.566 | 100.0% |",
        "| range, perplexity, without Magnitude | 20.00 | 12.00 | 60.0% |",
        "| standard deviation, perplexity, without Magnitude | 10.00 | 6.00 | 60.0% |",
        "| range, nats, without Magnitude | 0.693 | 0.693 | 100.0% |",
        "| standard deviation, nats, without Magnitude | 0.347 | 0.347 | 100.0% |",
        "",
        "![nats of each criterion](<runs/criteria/tiny/criteria.png>)",
    ]


def test_the_terminal_shows_the_spread_below_the_table_and_where_the_figure_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    runs = make_runs(tmp_path / "a name that is long enough for a line of its own")
    main([str(run) for run in runs])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "block, Wanda + Swaps" in lines and "block, Wanda" in lines and "block, Magnitude" in lines
    below = lines[lines.index(ABOUT) :]
    assert [" ".join(line.split()) for line in below[2:3] + below[4:9]] == [
        "spread between criteria, 3 runs pruned reconstructed left",
        "range, perplexity 60.00 36.00 60.0%",
        "standard deviation, perplexity 24.94 14.97 60.0%",
        "range, nats 1.386 1.386 100.0%",
        "standard deviation, nats 0.566 0.566 100.0%",
        "range, perplexity, without Magnitude 20.00 12.00 60.0%",
    ]
    assert below[-2:] == [f"Figure: {runs[0].parent / 'criteria.png'}", f"Report: {runs[0]}"]


def test_runs_are_of_one_study_only_if_all_but_the_criterion_is_the_same(tmp_path: Path) -> None:
    protocol = in_units(1)["protocol"]
    others: dict[str, dict[str, Any]] = {
        "seed": {"seed": 8},
        "calibration": {"tokens": {"calibration": 1024}},
        "precision": {"protocol": protocol | {"precision": "bf16-mixed"}},
        "model": {"model": {"name": "other"}},
        "pattern": {"recipe": in_units(1)["recipe"] | {"pattern": "2:4"}},
        "epochs": {"recipe": in_units(1)["recipe"] | {"epochs": "4"}},
    }
    wanda = make_run(tmp_path / "wanda", results_by("wanda"), curves=False)
    for name, setting in others.items():
        other = make_run(tmp_path / name, results_by("magnitude", **setting), curves=False)
        assert found(wanda, other) == [], name
    alike = make_run(tmp_path / "magnitude", results_by("magnitude"), curves=False)
    assert [list(study.runs) for study in found(wanda, alike)] == [["Wanda", "Magnitude"]]


def test_runs_by_one_criterion_are_no_study_and_leave_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / name, results_by("wanda"), curves=False) for name in ("first", "second")]
    main([str(run) for run in runs])
    assert "spread" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_two_runs_by_one_criterion_in_a_study_are_told_apart_by_their_names(tmp_path: Path) -> None:
    again = make_run(tmp_path / "again", results_by("wanda"), curves=False)
    (study,) = found(again, *make_runs(tmp_path))
    assert list(study.runs) == ["Wanda (again)", "Magnitude", "Wanda (wanda)", "Wanda + Swaps"]


def test_every_study_has_a_figure_in_the_folder_of_its_runs_and_says_in_what_it_differs(tmp_path: Path) -> None:
    runs = [*make_runs(tmp_path / "apart", seed=1), *make_runs(tmp_path / "both", seed=2)]
    runs += make_runs(tmp_path / "both", prefix="again_", seed=3)
    all_studies = found(*runs)
    assert [study.figure.relative_to(tmp_path).as_posix() for study in all_studies] == [
        "apart/criteria.png",
        "both/criteria_1.png",
        "both/criteria_2.png",
    ]
    assert [study.about for study in all_studies] == [f"{ABOUT}, seed {seed}" for seed in (1, 2, 3)]


def test_the_command_runs_again_with_the_same_pattern_of_paths_that_now_matches_its_figure(tmp_path: Path) -> None:
    make_runs(tmp_path)
    for _ in range(2):
        assert main([str(path) for path in sorted(tmp_path.glob("*"))]) == 0
    with Image.open(tmp_path / "criteria.png") as image:
        assert image.format == "PNG" and image.width == 1500 and len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert main([str(tmp_path / "criteria.png")]) == 2


def test_a_figure_that_cannot_be_written_gets_one_message_after_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = make_runs(tmp_path)
    (tmp_path / "criteria.png").mkdir()
    assert main([str(run) for run in runs]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"{tmp_path / 'criteria.png'}: the figure cannot be written")
    assert "range, nats" in said.out and "Figure" not in said.out


def dots(figure: Figure, row: int) -> list[float]:
    """Values of the dots in a row: pruned, reconstructed."""
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o" and list(line.get_ydata()) == [row]]
    return [float(line.get_xdata()[0]) for line in points]


def test_the_figure_has_a_row_per_criterion_the_best_first_and_brackets_over_both_ranges(tmp_path: Path) -> None:
    (study,) = found(*make_runs(tmp_path))
    figure = criteria(study)
    assert labels(figure) == ["Wanda + Swaps", "Wanda", "Magnitude", "spread, pruned", "spread, reconstructed"]
    assert figure.axes[0].yaxis_inverted(), "the first row is at the top"
    nats = [
        [math.log(perplexity / DENSE) for perplexity in PERPLEXITIES[case]] for case in ("swaps", "wanda", "magnitude")
    ]
    assert [dots(figure, row) for row in range(3)] == [pytest.approx(row) for row in nats]
    brackets = [list(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() == "|"]
    assert brackets == [pytest.approx([math.log(2), math.log(8)]), pytest.approx([math.log(1.2), math.log(4.8)])]
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written[:2] == ["0.693", "0.182"]
    assert written[-2:] == ["range 1.386, standard deviation 0.566"] * 2


def test_names_that_are_no_utf_8_are_drawn_and_printed(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, prefix="$a_[b]_", model={"name": "caf\udce9 $x$"})
    assert main([str(run) for run in runs]) == 0
    assert (tmp_path / "criteria.png").is_file()
    (study,) = found(*runs)
    assert criteria(study).get_suptitle().startswith("caf\\udce9 $x$, unstructured")


def labels(figure: Figure) -> list[str]:
    """What stands beside the rows, from the top."""
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


@pytest.mark.parametrize(("far", "is_drawn"), [(DENSE * 2**9, True), (DENSE * 2**11, False)])
def test_a_criterion_that_is_far_worse_than_all_others_is_written_and_the_spread_drawn_is_that_of_the_others(
    far: float, is_drawn: bool, tmp_path: Path
) -> None:
    runs = make_runs(tmp_path)[1:]  # log 4 and log 2 nats: the limit is five times log 4
    worst = results_by("magnitude")
    worst["perplexity"] |= {"pruned": far, "reconstructed": 30.0}
    (study,) = found(*runs, make_run(tmp_path / "worst", worst, curves=False))
    figure = criteria(study)
    written = [text.get_text() for text in figure.axes[0].texts]
    assert bool(dots(figure, 2)) == is_drawn
    assert ("off the scale: pruned 7.625, reconstructed 1.099 \u25b8" in written) != is_drawn
    assert ("range 0.693, standard deviation 0.347" in written) != is_drawn
    assert labels(figure)[2:4] == ["Magnitude", "spread, pruned" if is_drawn else "spread, pruned\nwithout Magnitude"]


@pytest.mark.filterwarnings("error")
def test_a_model_that_broke_is_named_and_makes_the_spread_of_its_state_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = make_runs(tmp_path)
    broken = results_by("wanda")
    broken["perplexity"] |= {"reconstructed": None}
    runs[1] = make_run(tmp_path / "broken", broken, curves=False)
    main(["--markdown", *map(str, runs)])
    said = capsys.readouterr().out
    assert "| range, perplexity | 60.00 | not finite | – |" in said
    assert "| range, nats | 1.386 | not finite | – |" in said
    (study,) = found(*runs)
    figure = criteria(study)
    assert labels(figure)[1] == "Wanda (reconstructed: not finite)" and dots(figure, 1) == [pytest.approx(math.log(4))]
    assert figure.axes[0].texts[-1].get_text() == "not finite"


def test_the_worst_is_one_whose_pruned_model_broke(tmp_path: Path) -> None:
    broken = results_by("swaps")
    broken["perplexity"] |= {"pruned": None}
    (study,) = found(make_run(tmp_path / "broken", broken, curves=False), *make_runs(tmp_path)[:2])
    assert study.worst == "Wanda + Swaps" and list(study.without(study.worst).runs) == ["Magnitude", "Wanda"]


def test_what_earlier_versions_called_a_split_parts_no_study(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    results = read_results(runs[0])
    results["protocol"]["split"] = "test"
    assert len(studies({run: read_results(run) for run in runs[1:]} | {runs[0]: results})[0].runs) == 3
