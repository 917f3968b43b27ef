"""What a run found, as results.json (other programs read it), as a table and as a model card."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lit_recon import __version__
from lit_recon.evaluate.perplexity import EvaluationProtocol
from lit_recon.fit.plan.estimate import Plan
from lit_recon.pruning.masks import Masks
from lit_recon.reconstruction.window_fit import WindowResult
from lit_recon.system.atomic_files import replaced, sync_folder
from lit_recon.system.units import duration, in_gb

_LIBRARIES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that a run found; the fields are those of results.json.

    `relative_error` is that of the last layer's hidden states on the held-out samples; all kinds of windows
    compare by it.
    """

    perplexity: dict[str, float]
    relative_error: dict[str, float]
    protocol: EvaluationProtocol
    model: dict[str, Any]
    recipe: dict[str, str]
    sparsity: dict[str, Any]
    windows: Sequence[WindowResult]
    seconds: dict[str, float]
    peak_memory_bytes: int
    walk_peak_memory_bytes: int
    predicted: dict[str, float]
    tokens: dict[str, int]
    seed: int

    @property
    def gap_recovered(self) -> float | None:
        """Share of the perplexity that pruning cost and reconstruction won back; None where pruning cost nothing."""
        dense, pruned, reconstructed = (self.perplexity[key] for key in ("dense", "pruned", "reconstructed"))
        return (pruned - reconstructed) / (pruned - dense) if pruned > dense else None

    def as_dict(self) -> dict[str, Any]:
        """The content of results.json."""
        versions = {"lit_recon": __version__} | {name: version(name) for name in _LIBRARIES}
        return asdict(self) | {"gap_recovered": self.gap_recovered, "versions": versions}

    def save(self, path: Path) -> None:
        """Write results.json, whole or not at all."""
        with replaced(path) as file:
            file.write((json.dumps(self.as_dict(), indent=2) + "\n").encode())
        sync_folder(path.parent)  # before the commits that these come from are removed


def sparsity(masks: Masks, plan: Plan) -> dict[str, Any]:
    """Share of zeros: in the whole model, among what was prunable, and in each matrix."""
    removed = {name: int((~masks[name]).sum()) for name in masks}
    sizes = {name: masks[name].numel() for name in masks}
    return {
        "total": sum(removed.values()) / plan.parameters,
        "prunable": sum(removed.values()) / max(1, sum(sizes.values())),
        "by_matrix": {name: removed[name] / sizes[name] for name in masks},
    }


def table(results: Results, run: Path) -> Table:
    """The last thing on the terminal."""
    shown = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    shown.add_column(style="bold")
    shown.add_column()
    for key, value in results.perplexity.items():
        shown.add_row(f"perplexity {key}", f"{value:.2f}")
    gap = results.gap_recovered
    shown.add_row("gap recovered", "none to recover" if gap is None else f"{gap:.0%}")
    errors = results.relative_error
    shown.add_row("relative error", f"{errors['pruned']:.3g} -> {errors['reconstructed']:.3g} (final hidden states)")
    sparsities = results.sparsity
    shown.add_row("sparsity", f"{sparsities['prunable']:.1%} of prunable, {sparsities['total']:.1%} of all parameters")
    phases = ", ".join(f"{name} {value:.1f}" for name, value in results.seconds.items() if name != "total")
    shown.add_row("seconds", f"{phases}")
    shown.add_row("", f"{duration(results.seconds['total'])} in total")
    shown.add_row("peak memory", in_gb(results.peak_memory_bytes))
    kept = [window for window in results.windows if window.note]
    for window in kept:
        shown.add_row(escape(window.name), escape(window.note))
    shown.add_row("files", escape(f"{run}/  (checkpoint/, report.html, results.json)"))
    shown.add_row("curves", escape(f"tensorboard --logdir {run.parent}"))
    return shown


def model_card(
    model: str,
    recipe: Mapping[str, str],
    plan: Plan,
    windows: Sequence[WindowResult],
    auto_class: str = "AutoModelForCausalLM",
) -> str:
    """README.md of the checkpoint: how it was made and how to read it, by a class of transformers."""
    accepted = sum(window.accepted for window in windows)
    rows = "\n".join(f"| {key} | {value} |" for key, value in recipe.items())
    left = plan.windows - len(windows)
    unfinished = f"| unfinished | {len(windows)} of {plan.windows} windows done, the rest is dense |\n" if left else ""
    return f"""---
library_name: transformers
tags: [pruning, sparse, local-reconstruction]
---
# {model}, pruned and reconstructed

Made with lit_recon {__version__}: pruned, then reconstructed one window at a time to match the dense model's
activations (Wagner, Roux, Zimmer, Pokutta: "A Free Lunch in LLM Compression", arXiv 2510.14444). Pruned weights are
exact zeros.

| | |
|---|---|
| dense model | {model} |
{rows}
| prunable | {plan.prunable / plan.parameters:.1%} of all parameters |
| windows reconstructed | {accepted} of {len(windows)} |
{unfinished}
```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("checkpoint")
tokenizer = AutoTokenizer.from_pretrained("checkpoint")
```
"""
