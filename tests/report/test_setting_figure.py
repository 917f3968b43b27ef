"""Quality over a setting: a line per choice of the others, a dot per value, the mean of seeds."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from finished_run import make_run
from many_runs import configure, make_many, results_of_setting

from lit_recon.report.measures import NATS
from lit_recon.report.overview import write_overview
from lit_recon.report.runs import Run, read_runs
from lit_recon.report.setting_figure import Curves, curves, setting_figure

SAMPLES, RATE = "data.num_samples", "module.optimizer.lr"


def by_key(runs: Sequence[Run]) -> dict[str, Curves]:
    return {one.key: one for one in curves(runs)}


def values(drawn: Curves) -> dict[str, list[str]]:
    return {label: [group.values[drawn.key] for group in groups] for label, groups in drawn.lines}


def test_each_setting_that_varies_by_number_has_lines_of_the_others_and_seeds_are_one_dot(tmp_path: Path) -> None:
    found = by_key(read_runs(make_many(tmp_path, (1e-3, 3e-4), (8, 32, 128), (0, 1))))
    assert set(found) == {SAMPLES, RATE}
    assert values(found[SAMPLES]) == {"0.0003": ["8", "32", "128"], "0.001": ["8", "32", "128"]}
    assert values(found[RATE]) == {number: ["0.0003", "0.001"] for number in ("8", "32", "128")}
    (axes,) = setting_figure(found[SAMPLES]).axes
    first, deviation = axes.get_lines()[4:6]  # after the other line and its three deviations
    assert first.get_xdata().tolist() == [8, 32, 128] and axes.get_xscale() == "log"
    # 16 + 40 / sqrt(8) + 0.05 seed, as the runs were made, where dense is 14.9012
    nats = [math.log((16 + 40 / 8**0.5 + 0.05 * seed) / 14.9012) for seed in (0, 1)]
    assert first.get_ydata()[0] == pytest.approx(sum(nats) / 2, rel=1e-6)
    assert max(deviation.get_ydata()) - min(deviation.get_ydata()) == pytest.approx(2**0.5 * (nats[1] - nats[0]))
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["0.001", "0.0003"], (
        "the worse one at the right end first"
    )
    assert legend.get_title().get_text() == RATE


def test_settings_that_are_words_or_vary_with_another_one_draw_no_line(tmp_path: Path) -> None:
    for number, by in ((8, "wanda.Wanda"), (32, "magnitude.Magnitude")):
        configure(make_run(tmp_path / by, results_of_setting(1e-3, number, 0), curves=False), samples=number, by=by)
    assert by_key(read_runs(tmp_path.iterdir())) == {}


def test_unfinished_runs_and_those_without_a_finite_number_are_left_out(tmp_path: Path) -> None:
    runs = make_many(tmp_path, (1e-3,), (8, 32, 64), (0,))
    broken = results_of_setting(1e-3, 128, 0)
    broken["perplexity"] |= {"reconstructed": None}
    configure(make_run(tmp_path / "broken", broken, curves=False), samples=128)
    configure(tmp_path / "failed", samples=256)
    found = by_key(read_runs([*runs, tmp_path / "broken", tmp_path / "failed"]))
    assert values(found[SAMPLES]) == {"": ["8", "32", "64"]}
    assert all(math.isfinite(group.mean(NATS)) for group in found[SAMPLES].lines[0].groups)
    (axes,) = setting_figure(found[SAMPLES]).axes
    assert axes.get_legend() is None and axes.get_xscale() == "linear"


def test_more_lines_than_can_be_told_apart_are_not_drawn(tmp_path: Path) -> None:
    many = by_key(read_runs(make_many(tmp_path, tuple(1e-5 * number for number in range(1, 18)), (8, 32), (0,))))
    assert RATE in many and SAMPLES not in many


def test_the_page_has_the_figure(tmp_path: Path) -> None:
    runs = make_many(tmp_path, (1e-3,), (8, 32), (0,))
    text = write_overview(read_runs(runs), tmp_path / "out").read_text(encoding="utf-8")
    assert "How much does a setting change?" in text and "Nats over the dense model over data.num_samples" in text
    assert (tmp_path / "out" / "figures" / "over_data_num_samples.png").stat().st_size > 10_000


def test_lines_are_named_by_their_folders_where_these_tell_them_apart_else_by_all_of_their_values(
    tmp_path: Path,
) -> None:
    long = "wanda.Wanda" + "y" * 70
    for number in (8, 32):
        for by in (f"{long}1", f"{long}2"):
            run = make_run(tmp_path / f"{number}_samples" / by[-5:], results_of_setting(1e-3, number, 0), curves=False)
            configure(run, samples=number, by=by)
    found = by_key(read_runs(tmp_path.glob("*/*")))
    assert values(found[SAMPLES]) == {"yyyy1": ["8", "32"], "yyyy2": ["8", "32"]} and found[SAMPLES].title == "runs"
    for folder in list(tmp_path.glob("*/*")):
        folder.rename(folder.with_name(f"{folder.parent.name}_{folder.name}"))
    found = by_key(read_runs(tmp_path.glob("*/*")))
    assert list(values(found[SAMPLES])) == [f"Wanda{'y' * 70}{number}" for number in (1, 2)]
    assert found[SAMPLES].title == "criterion"
    (axes,) = setting_figure(found[SAMPLES]).axes
    assert {len(text.get_text()) for text in axes.get_legend().get_texts()} == {60}, "shortened when it is drawn"


def test_a_setting_with_a_slash_in_its_name_has_a_figure_too(tmp_path: Path) -> None:
    runs = make_many(tmp_path, (1e-3,), (8, 32), (0,))
    for run, weight in zip(runs, (1, 2), strict=True):
        text = (run / "config.yaml").read_text().replace("num_samples: 32", "num_samples: 8")
        (run / "config.yaml").write_text(text + f"weights:\n  c4/en: {weight}\n")
    write_overview(read_runs(runs), tmp_path / "out")
    assert (tmp_path / "out" / "figures" / "over_weights_c4_en.png").is_file()
