"""results.json is written whole, or what was there stays."""

import io
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lit_recon.evaluate.perplexity import EvaluationProtocol
from lit_recon.fit.output.results import Results, remarks, table
from lit_recon.reconstruction.window_result import WindowResult


def results(seed: int = 0, **nats: float) -> Results:
    return Results(
        nats={"dense": math.log(10), "pruned": math.log(20), "reconstructed": math.log(14)} | nats,
        relative_error={"pruned": 0.3, "reconstructed": 0.1},
        typical_error={"pruned": 0.2, "reconstructed": 0.05},
        protocol=EvaluationProtocol(
            dataset="d", split="evaluation", context=4, windows=1, tokens=3, precision="32-true"
        ),
        model={"name": "tiny"},
        recipe={"criterion": "Magnitude"},
        sparsity={"total": 0.4, "prunable": 0.5, "by_matrix": {}},
        windows=[],
        seconds={"total": 1.0},
        peak_memory_bytes=2,
        walk_peak_memory_bytes=1,
        phase_peak_memory_bytes={"fit": 1},
        predicted={"seconds": 1.0, "peak_memory_bytes": 2},
        tokens={"calibration": 4},
        seed=seed,
        compute={},
        provenance={},
    )


def test_results_that_could_not_be_written_whole_leave_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    results(seed=1).save(path)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        results(seed=2).save(path)
    found = json.loads(path.read_text())
    assert found["seed"] == 1 and found["gap_recovered"] == pytest.approx(0.6)


def test_a_rename_that_fails_leaves_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError("interrupted")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="interrupted"):
        results(seed=1).save(tmp_path / "results.json")
    assert not (tmp_path / "results.json").exists()


def said(found: Results) -> str:
    """The table on the terminal."""
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(found, Path("run")))
    return console.export_text()


@pytest.mark.parametrize(
    ("nats", "shown"),
    [
        ({"pruned": math.nan}, "not finite (nan nats"),
        ({"dense": math.nan}, "not finite"),
        ({"reconstructed": math.inf}, "not finite"),
        ({"pruned": 800.0}, "not finite (800 nats per token)"),  # beyond the largest number, and a number nevertheless
    ],
    ids=str,
)
def test_results_that_are_not_finite_are_null_in_strict_json_and_no_gap_is_told(
    tmp_path: Path, nats: dict[str, float], shown: str
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    made, ((state, value),) = results(**nats), nats.items()
    made.save(tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert found["perplexity"][state] is None and found["gap_recovered"] is None
    assert found["nats"][state] == (value if math.isfinite(value) else None)
    if state != "dense":
        assert found["perplexity"]["dense"] == pytest.approx(10)
    assert "not known" in said(made) and "none to recover" not in said(made) and shown in said(made)


def test_where_pruning_cost_nothing_there_is_no_gap_to_recover() -> None:
    made = results(pruned=math.log(9))
    assert made.gap_recovered is None and "none to recover" in said(made) and "not known" not in said(made)


def test_the_gap_in_nats_stands_beside_that_in_perplexity() -> None:
    found = results().as_dict()
    assert found["gap_recovered_nats"] == pytest.approx(math.log(20 / 14) / math.log(2))
    assert found["nats"]["pruned"] == pytest.approx(math.log(20)) and found["perplexity"]["pruned"] == pytest.approx(20)


def test_windows_of_which_there_is_the_same_to_say_are_told_in_one_line_and_rounding_in_another() -> None:
    one = WindowResult(
        name="block_00",
        relative_error_before=0.1,
        relative_error_after=0.1,
        held_out_before=0.1,
        held_out_after=0.1,
        accepted=True,
        steps=1,
        seconds=1.0,
    )
    windows = [
        replace(one, note="a"),
        replace(one, name="block_01", note="a"),
        replace(one, name="block_02", note="b", lost_by_rounding=0.04),
        replace(one, name="block_03", lost_by_rounding=0.12),
    ]
    *notes, (about, rounding) = remarks(windows)
    assert notes == [("2 windows", "a"), ("block_02", "b")] and about == "rounding"
    assert "in 1 of 4 windows, 12% in block_03" in rounding and "model.dtype=float32" in rounding
    assert remarks(windows[:2]) == [("2 windows", "a")]
