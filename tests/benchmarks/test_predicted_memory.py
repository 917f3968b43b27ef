"""Whether the plan tells how much memory a walk takes, for each kind of window: pytest -m slow -s."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

KINDS = {
    "half": ("windows=half",),
    "block": ("windows=block",),
    "blocks of 4": ("windows=blocks", "windows.size=4"),
    "model": ("windows=model",),
    "matrix": ("windows=matrix",),
    "least squares": ("windows=matrix", "module=least_squares"),
}
SHORT = ("data.num_samples=128", "data.evaluation_samples=2")  # the table's samples, and little of all else
TWO_STEPS = ("trainer.max_epochs=-1", "trainer.max_steps=2")


def test_the_peak_of_a_walk_is_predicted_within_a_fifth_and_grows_with_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIT_RECON_CACHE")  # the user's own cache, where the model is
    peaks, off = {}, {}
    for kind, choice in KINDS.items():
        run = tmp_path / kind.replace(" ", "_")
        settings = [*choice, *SHORT, *(() if kind == "least squares" else TWO_STEPS), f"output_dir={run}"]
        subprocess.run([sys.executable, "-m", "lit_recon.fit", *settings], check=True)
        results = json.loads((run / "results.json").read_text())
        measured, predicted = (found["walk_peak_memory_bytes"] for found in (results, results["predicted"]))
        peaks[kind], off[kind] = measured, predicted / measured - 1
        print(f"{kind}: {measured / 1e9:.2f} GB, predicted {predicted / 1e9:.2f} GB, {off[kind]:+.0%}")
    assert max(map(abs, off.values())) < 0.2, off
    assert peaks["half"] < 1.1 * peaks["block"] < peaks["blocks of 4"] < peaks["model"]
