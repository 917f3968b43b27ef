"""results.json is written whole, or what was there stays."""

import json
import math
import os
from pathlib import Path

import pytest

from lit_recon.evaluate.perplexity import EvaluationProtocol
from lit_recon.fit.output.results import Results


def results(seed: int = 0, **nats: float) -> Results:
    return Results(
        nats={"dense": math.log(10), "pruned": math.log(20), "reconstructed": math.log(14)} | nats,
        relative_error={"pruned": 0.3, "reconstructed": 0.1},
        protocol=EvaluationProtocol(
            dataset="d", split="evaluation", context=4, windows=1, tokens=3, precision="32-true"
        ),
        model={"name": "tiny"},
        recipe={"criterion": "Magnitude"},
        sparsity={"total": 0.4, "by_matrix": {}},
        windows=[],
        seconds={"total": 1.0},
        peak_memory_bytes=2,
        walk_peak_memory_bytes=1,
        predicted={"seconds": 1.0, "peak_memory_bytes": 2},
        tokens={"calibration": 4},
        seed=seed,
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
