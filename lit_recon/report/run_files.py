"""Files of a finished run, read back: results.json, and the curves in TensorBoard's event files.

All that reports show comes from here, so that a report can be made anywhere and at any time: it needs the run's
folder, not the model, nor the version of lit_recon that made the run.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS_KEYS = (
    "perplexity gap_recovered protocol model recipe sparsity windows seconds peak_memory_bytes tokens versions seed"
).split()

Curve = list[tuple[int, float]]  # (global step, value)


def read_results(run: Path) -> dict[str, Any]:
    """Content of a run's results.json.

    Raises:
        ValueError: There is no results.json, it cannot be read, or it is not one of lit_recon.
    """
    path, expected = run / "results.json", "expected the folder of a finished run, with its results.json in it"
    if not path.is_file():
        raise ValueError(f"{run}: {'no results.json here' if run.is_dir() else 'not a folder'}; {expected}.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); {expected}.") from error
    missing = [key for key in RESULTS_KEYS if not isinstance(results, dict) or key not in results]
    if missing:
        raise ValueError(f"{path}: without {', '.join(missing)}; {expected}, as lit_recon.fit writes it.")
    return results


def read_curves(run: Path) -> dict[str, Curve]:
    """Curves of a run by tag, such as "block_03/loss/train": all scalars of its event files, empty without any."""
    if not any((run / "tensorboard").glob("*tfevents*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator  # takes 0.3 s

    # 0 = keep everything (the default thins curves out); a depth curve that starts at step 0 again is no crashed run
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={SCALARS: 0}, purge_orphaned_data=False)
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def finite_or_nan(value: float | None) -> float:
    """A number of results.json for plots and comparisons: NaN, which plots as nothing, if it is None or overflowed."""
    return math.nan if value is None or not math.isfinite(value) else float(value)


def measure(windows: Sequence[Mapping[str, Any]]) -> str:
    """Measure of the windows' errors: "relative error" or "KL divergence", and "error" if windows differ in it."""
    measures = {window.get("measure", "relative error") for window in windows}
    return measures.pop() if len(measures) == 1 else "error"
