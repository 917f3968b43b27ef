"""The page of a checkpoint that no run here made, from its evaluations alone: how good is it, and where is the error?

The same part as on the page of a run (evaluation_section.py), below the newest numbers in a sentence.
checkpoint.html.j2 is its text and layout.
"""

import base64
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_recon.report.evaluation_section import STATES, evaluation_figures, evaluation_section, nats_over_dense
from lit_recon.report.evaluations import Evaluation, is_record, latest, protocol_text, read_evaluations
from lit_recon.report.figures import save_figures, time_per_phase
from lit_recon.report.format import as_error, as_nats, as_perplexity, as_share
from lit_recon.report.page import publish
from lit_recon.report.run_files import finite_or_nan
from lit_recon.report.templates import relative_link, render


class Fact(NamedTuple):
    """A number at the top of the page: what it is, as people read it, on what, and of which state of the model."""

    name: str
    text: str
    detail: str = ""
    kind: str = ""


def write_checkpoint_report(place: Path, out: Path) -> Path:
    """Draw the figures of an evaluated checkpoint and write its page.

    Args:
        place: The folder of the checkpoint, or the record of its evaluations.
        out: The folder for page, figures and, there only, the tables.

    Returns:
        The page; it needs no other file and no network.

    Raises:
        ValueError: There are no evaluations.
    """
    evaluations, unread = read_evaluations(place)
    if not evaluations:
        raise ValueError(f"{place}: no evaluations here; expected what lit_recon.evaluate writes.")
    seconds = latest(evaluations, "seconds")
    drawn = evaluation_figures(evaluations) | {"time": lambda: time_per_phase(seconds) if seconds else None}
    images = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in save_figures(drawn, out)}
    section = evaluation_section(evaluations)
    record = place if is_record(place) else place / "evaluations.json"
    name = evaluations[-1].checkpoint or place.name
    page = render(
        "checkpoint.html.j2",
        title=record.stem.replace("--", "/") if is_record(place) else place.resolve().name,
        images=images,
        unread=unread,
        checkpoint=name,
        dense=evaluations[-1].dense,
        verdict=verdict(latest(evaluations, "perplexity")),
        facts=facts(evaluations),
        versions=latest(evaluations, "versions") or {},
        quoted_name=json.dumps(name, ensure_ascii=False),
        call=shlex.join([f"checkpoint={name}", *([f"dense={evaluations[-1].dense}"] if evaluations[-1].dense else [])]),
        record=record.resolve().as_posix(),
        files={relative_link(record, out): "what was evaluated, all of it", "figures/": "the figures of this page"},
        **section,
    )
    is_apart = out.resolve() != place.resolve()
    return publish(page, section["evaluation_tables"] if is_apart else {}, out)


def verdict(found: Mapping[str, Any] | None) -> tuple[str, str]:
    """Verdict on the newest perplexity: "good", "bad" or "neutral", and a sentence; empty where there is none."""
    if found is None:
        return "neutral", ""
    gap, over = finite_or_nan(found.get("gap_recovered")), nats_over_dense(found)
    value, dense = (found["perplexity"].get(state) for state in ("checkpoint", "dense"))
    if math.isnan(finite_or_nan(value)):
        return "bad", "The checkpoint is broken: its perplexity is not finite."
    if not math.isnan(gap):
        return ("good" if gap > 0 else "bad"), f"It has back {as_share(gap)} of the perplexity that pruning had cost."
    if math.isnan(over):
        return "neutral", f"Perplexity {as_perplexity(value)}; no dense model was given to compare with."
    numbers = f"perplexity {as_perplexity(value)} instead of {as_perplexity(dense)}"
    if over <= 0:
        return "good", f"No worse than the dense model: {numbers}."
    return "neutral", f"{as_nats(over)} nats per token worse than the dense model: {numbers}."


def facts(evaluations: Sequence[Evaluation]) -> list[Fact]:
    """The newest numbers that are known."""
    found: list[Fact] = []
    perplexity, agreement, tasks = (latest(evaluations, part) for part in ("perplexity", "agreement", "tasks"))
    if perplexity is not None:
        text = protocol_text(perplexity["protocol"])
        for state, kind in (("dense", "dense"), ("pruned", "pruned"), ("checkpoint", "reconstructed")):
            if state in perplexity["perplexity"]:
                value = as_perplexity(perplexity["perplexity"][state])
                detail = text if state == "checkpoint" else ""
                found.append(Fact(f"perplexity, {STATES[state]}", value, detail, kind))
        if not math.isnan(over := nats_over_dense(perplexity)):
            found.append(Fact("over the dense model", as_nats(over), "nats per token"))
        if perplexity.get("gap_recovered") is not None:
            found.append(Fact("gap recovered", as_share(perplexity["gap_recovered"]), "of pruned minus dense"))
    if agreement is not None:
        found.append(Fact("KL from dense", as_error(agreement.get("kl")), "nats per token"))
        found.append(Fact("top-1 agreement", as_share(agreement.get("top1")), "the same likeliest next token"))
    mean = (tasks or {}).get("mean") or {}
    if mean.get("checkpoint") is not None:
        beside = f"dense {as_share(mean['dense'])}" if mean.get("dense") is not None else ""
        found.append(Fact("accuracy, mean of tasks", as_share(mean["checkpoint"]), beside))
    return found
