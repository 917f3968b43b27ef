"""Progress of an evaluation: lines with the time left, of parts whose size is known before or as they begin."""

import io
import logging

import pytest

from lit_recon.evaluate import progress as module
from lit_recon.evaluate.progress import EvaluationProgress
from lit_recon.system.console import Console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a test sets."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_each_tenth_is_a_line_with_the_time_left(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with EvaluationProgress(Console(file=io.StringIO()), 20) as progress:
        for _ in range(3):
            clock[0] += 10
            progress.tick("layer")
        clock[0] += 30
        progress.tick("layer", 7)  # 10 of 20 after a minute
    assert caplog.messages == ["10% layer, 3 min 00 s left", "50% layer, 60.0 s left"]


def test_time_before_the_first_pieces_are_known_is_no_measure_of_them(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with EvaluationProgress(Console(file=io.StringIO())) as progress:
        clock[0] += 1000
        progress.expect(10)
        clock[0] += 5
        progress.tick("tasks")
        progress.expect(10)
        clock[0] += 5
        progress.tick("tasks")
    assert caplog.messages == ["10% tasks, 45.0 s left", "10% tasks, 90.0 s left"]
