"""Files of a finished run, read back: results.json, and the curves in TensorBoard's event files.

All that reports show comes from here, so that a report can be made anywhere and at any time: it needs the run's
folder, not the model, nor the version of lit_recon that made the run.
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lit_recon.report.shapes import FLAG, LARGEST, MAYBE, NUMBER, TEXT, problems_of
from lit_recon.system.clock import WALK

STUDY_FIGURE = "criteria{}.png"  # lies next to the runs that it compares; a number where there are several
RESULTS: dict[Any, Any] = {  # what reports read of results.json; "?": may be absent or null; str: any other name
    "perplexity": {"dense": MAYBE, "pruned": MAYBE, "reconstructed": MAYBE},
    "gap_recovered": MAYBE,
    "gap_recovered_nats?": MAYBE,
    "protocol": {"dataset": None, "windows": None, "context": None},
    "model": {"name": TEXT, "covered?": MAYBE},
    "recipe": {"criterion": TEXT, "refine?": TEXT, "pattern": TEXT, "windows": TEXT, "module?": TEXT},
    "sparsity": {"total": MAYBE, "prunable": MAYBE, "by_matrix": {str: NUMBER}},
    "windows": [
        {
            **{"name": TEXT, "accepted": FLAG, "steps": NUMBER, "seconds": NUMBER, "note?": TEXT, "measure?": TEXT},
            **{"held_out_before": MAYBE, "held_out_after": MAYBE},
            **{"relative_error_before": MAYBE, "relative_error_after": MAYBE},
            **{"typical_before?": MAYBE, "typical_after?": MAYBE, "unit?": MAYBE, "rate?": MAYBE, "tries?": [[MAYBE]]},
        }
    ],
    "seconds": {"total": NUMBER, **dict.fromkeys(WALK, NUMBER), str: NUMBER},
    "peak_memory_bytes": MAYBE,
    "tokens": {"calibration": NUMBER, "retraining?": NUMBER},
    "versions": {str: TEXT},
    "seed": None,
    "relative_error?": {"pruned": MAYBE, "reconstructed": MAYBE},
    "typical_error?": {"pruned": MAYBE, "reconstructed": MAYBE},
    "walk_peak_memory_bytes?": MAYBE,
    "phase_peak_memory_bytes?": {str: NUMBER},
    "walk_peak_host_bytes?": MAYBE,
    "predicted?": {
        "seconds": NUMBER,
        **{"peak_memory_bytes": MAYBE, "walk_peak_memory_bytes?": MAYBE, "walk_peak_host_bytes?": MAYBE},
    },
}

Curve = list[tuple[int, float]]  # (global step, value)


def read_results(run: Path) -> dict[str, Any]:
    """Content of a run's results.json.

    Raises:
        ValueError: There is no results.json, it cannot be read, or it is not one of lit_recon.
    """
    path, expected = run / "results.json", "expected the folder of a finished run, with its results.json in it"
    if not path.is_file():
        found = "no results.json here" if run.is_dir() else "not a folder"
        raise ValueError(f"{run}: {found}; {expected}{_runs_below(run)}.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); {expected}.") from error
    if problems := list(islice(problems_of(results, RESULTS, ""), 3)):
        raise ValueError(f"{path}: {'; '.join(problems)}; {expected}, as lit_recon.fit writes it{_origin(results)}.")
    return results


def _runs_below(folder: Path) -> str:
    """Where the runs of a study are, for whoever gave its folder."""
    below = next((names for names in ("*", "*/*") if any(folder.glob(f"{names}/results.json"))), None)
    return f", such as those of {folder}/{below}" if below else ""


def _origin(results: Any) -> str:
    """The version that wrote results which are not as they are today, where they say so."""
    versions = results.get("versions") if isinstance(results, dict) else None
    version = versions.get("lit_recon") if isinstance(versions, dict) else None
    return f"; this was written by lit_recon {version[:20]}" if isinstance(version, str) else ""


def is_study_figure(path: Path) -> bool:
    """Whether a path is the figure of a study, which runs/* matches as well as the runs next to it."""
    return path.match(STUDY_FIGURE.format("*")) and path.is_file()


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
    return math.nan if value is None or not abs(value) < LARGEST else float(value)


def measure(windows: Sequence[Mapping[str, Any]]) -> str:
    """Measure of the windows' errors: "relative error" or "KL divergence", and "error" if windows differ in it."""
    measures = {window.get("measure", "relative error") for window in windows}
    return measures.pop() if len(measures) == 1 else "error"


def has_units(windows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether errors are in units of the median energy of a window's dense update.

    Until version 0.4 they were in units of the variance of its target, and there was no typical error.
    """
    return all("unit" in window for window in windows)
