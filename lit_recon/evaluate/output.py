"""Result of an evaluation as the last thing on the terminal."""

import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lit_recon.evaluate.subjects import RECORD
from lit_recon.system.units import duration, in_gb


def table(entry: Mapping[str, Any], record: Path | None) -> Table:
    """An entry of a record as a table.

    Args:
        entry: The entry.
        record: The file that it was added to; None: it was not.
    """
    shown = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    shown.add_column(style="bold")
    shown.add_column()
    if (found := entry["perplexity"]) is not None:
        for state, value in found["perplexity"].items():
            nats = f"{found['nats'][state]:.4f} nats per token"
            shown.add_row(
                f"perplexity {state}", f"{value:.2f} ({nats})" if math.isfinite(value) else f"not finite ({nats})"
            )
        if found["gap_recovered"] is not None:
            share = f"{found['gap_recovered']:.0%} in perplexity, {found['gap_recovered_nats']:.0%} in nats"
            shown.add_row("gap recovered", share)
    if (found := entry["agreement"]) is not None:
        shown.add_row("KL divergence", f"{found['kl']:.4g} nats per token from the dense model")
        shown.add_row("top-1 agreement", f"{found['top1']:.1%} of {found['tokens']} tokens")
        if found["hidden"]:
            last = found["hidden"][-1]
            shown.add_row(
                "relative error", f"{last['mean']:.3g}, typical token {last['typical']:.3g} (final hidden states)"
            )
    for about, text in _others(entry):
        shown.add_row(escape(about), escape(text))
    phases = ", ".join(f"{name} {value:.1f}" for name, value in entry["seconds"].items() if name != "total")
    shown.add_row("seconds", f"{phases}; {duration(entry['seconds']['total'])} in total")
    shown.add_row("peak memory", in_gb(entry["peak_memory_bytes"]))
    if record is not None:
        shown.add_row("added to", escape(str(record)))
        place = record.parent if record.name == RECORD else record
        shown.add_row("figures", escape(f"python -m lit_recon.report {shlex.quote(str(place))}"))
    return shown


def _others(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of tasks, continuations and drift."""
    for result in (entry["tasks"] or {}).get("results", []):
        error = "" if result["stderr"] is None else f" +- {result['stderr']:.3f}"
        yield f"{result['task']} {result['metric']}", f"{result['value']:.3f}{error} ({result['state']})"
    for state, mean in (entry["tasks"] or {}).get("mean", {}).items():
        if mean is not None:
            yield "mean of acc", f"{mean:.3f} ({state})"
    for one in entry["continuations"] or []:
        yield "prompt", one["prompt"]
        for state, text in one["texts"].items():
            yield f"  {state}", text + (" [repeats itself]" if one["degenerates"][state] else "")
    if entry["drift"]:
        worst = max(entry["drift"], key=lambda one: one["local"]["mean"])
        yield "drift", f"local at most {worst['local']['mean']:.3g}, of {worst['matrix']}"
