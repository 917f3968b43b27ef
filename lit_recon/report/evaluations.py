"""evaluations.json, read back: what `python -m lit_recon.evaluate` measured on a checkpoint, each time anew.

Read leniently: what another version wrote is shown as far as it is understood, and a damaged file or part is a remark.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lit_recon.report.shapes import FLAG, MAYBE, NUMBER, TEXT, problems_of

PERPLEXITIES = {"dense?": MAYBE, "pruned?": MAYBE, "checkpoint": MAYBE}
TEXTS = {"dense?": TEXT, "pruned?": TEXT, "checkpoint": TEXT}
ENTRY_SHAPE: dict[str, Any] = {  # of one evaluation; "?": may be absent or null
    "perplexity": {
        "protocol": {str: None},
        "perplexity": PERPLEXITIES,
        "nats?": PERPLEXITIES,
        "gap_recovered?": MAYBE,
        "gap_recovered_nats?": MAYBE,
    },
    "agreement": {
        "kl?": MAYBE,
        "top1?": MAYBE,
        "tokens?": MAYBE,
        "hidden?": [{"layer": MAYBE, "mean?": MAYBE, "typical?": MAYBE}],
    },
    "tasks": {
        "harness?": TEXT,
        "results": [
            {
                **{"task": TEXT, "metric": TEXT, "state": TEXT, "value": MAYBE},
                **{"stderr?": MAYBE, "samples?": MAYBE, "fewshot?": MAYBE},
            }
        ],
        "mean?": {str: MAYBE},
    },
    "continuations": [{"prompt": TEXT, "texts": TEXTS, "repetition?": {str: MAYBE}, "degenerates?": {str: FLAG}}],
    "drift": [
        {
            **{"matrix": TEXT, "layer": NUMBER, "kind": TEXT},
            **{"local?": {"mean?": MAYBE, "max?": MAYBE}, "accumulated?": {"mean?": MAYBE, "max?": MAYBE}},
        }
    ],
    "seconds": {"total": NUMBER, str: NUMBER},
    "peak_memory_bytes": MAYBE,
    "versions": {str: TEXT},
}


@dataclass(frozen=True)
class Evaluation:
    """One entry of evaluations.json.

    Attributes:
        when: Date and time as text.
        checkpoint: What was evaluated.
        dense: What it was compared with; empty for nothing.
        parts: Of perplexity, agreement, tasks, continuations, drift, and of seconds, peak memory and versions those
            that it has, in the shapes above.
    """

    when: str
    checkpoint: str
    dense: str = ""
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def time(self) -> str:
        """Date and time as people read them."""
        return self.when.replace("T", " ").replace("+00:00", " UTC") or "an unknown time"


def read_evaluations(run: Path) -> tuple[tuple[Evaluation, ...], tuple[str, ...]]:
    """Evaluations of a run, the oldest first, and remarks on what could not be read.

    Args:
        run: The folder of the run, or of a model; or the record itself, which those of the Hub's models have.
    """
    path = run if is_record(run) else run / "evaluations.json"
    if not path.is_file():
        return (), ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return (), (f"{path}: cannot be read as JSON ({' '.join(str(error).split())}); it is left out.",)
    entries = content.get("evaluations") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        return (), (f"{path}: it has no list of evaluations; it is left out.",)
    found, problems = [], []
    for number, entry in enumerate(entries):
        evaluation, unclear = _evaluation(entry, f"evaluations[{number}]")
        found += [evaluation] if evaluation else []
        problems += unclear
    return tuple(found), (f"{path}: {'; '.join(problems[:3])}; left out.",) if problems else ()


def protocol_text(protocol: Mapping[str, Any]) -> str:
    """What perplexity was measured on, as far as it is known: data set, windows and their length, opening, stride."""
    windows, context, opening = (protocol.get(key) for key in ("windows", "context", "opening"))
    who = "the text" if protocol.get("opening_at") == "text" else "each"
    text = str(protocol.get("dataset") or "unknown text")
    text += f", {windows} x {context} tokens" if windows is not None and context is not None else ""
    text += f", {who} after {opening}" if opening not in (None, "none") else ""  # versions before 0.4 do not say
    return text + (f", stride {stride}" if (stride := protocol.get("stride")) is not None else "")


def tasks_text(tasks: Mapping[str, Any]) -> str:
    """Scores of a checkpoint on tasks."""
    scores = [one for one in tasks["results"] if one["state"] == "checkpoint" and one["value"] is not None]
    return ", ".join(f"{one['task']} {one['metric']} {one['value']:.3f}" for one in scores)


def is_record(path: Path) -> bool:
    """Whether a path is a record of evaluations outside a run's folder; what is in it is not looked at."""
    return path.suffix == ".json" and path.is_file() and not (path.parent / "config.yaml").exists()


def _evaluation(entry: Any, where: str) -> tuple[Evaluation | None, list[str]]:
    """One entry as far as it is understood; None if that is nothing."""
    if not isinstance(entry, dict):
        return None, [f"{where} is no mapping of names to values"]
    parts, problems = {}, []
    for name, shape in ENTRY_SHAPE.items():
        if (part := entry.get(name)) is None:
            continue
        unclear = list(islice(problems_of(part, shape, f"{where}.{name}"), 1))
        problems += unclear
        if not unclear:
            parts[name] = part
    texts = {key: str(entry.get(key) or "") for key in ("when", "checkpoint", "dense")}
    return Evaluation(**texts, parts=parts), problems


def latest(evaluations: Sequence[Evaluation], part: str) -> Any:
    """The newest of one part, such as "tasks"; None if no evaluation has it."""
    return next((each.parts[part] for each in reversed(evaluations) if part in each.parts), None)
