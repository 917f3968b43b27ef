"""What a run found, as results.json (other programs read it) and as a table."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lit_recon.data.source import Samples
from lit_recon.evaluate.perplexity import EvaluationProtocol, perplexity_of, share_recovered
from lit_recon.pruning.masks import Masks
from lit_recon.reconstruction.window_result import WindowResult
from lit_recon.system.atomic_files import replaced, sync_folder
from lit_recon.system.device import Compute
from lit_recon.system.finite import without_nan
from lit_recon.system.units import duration, in_gb
from lit_recon.system.versions import versions

_NOTED = 0.05  # of a window's gain: what rounding takes of it and is worth a remark


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that a run found; the fields are those of results.json.

    `nats` are mean negative log-likelihoods per token, of which perplexity is the exponential. `relative_error` is that
    of the last layer's hidden states on evaluation samples, the first ones, as many tokens as are held out: the mean
    over tokens, in units of the median energy of the dense model's states; all kinds of windows compare by it.
    `typical_error` is the median over tokens. Sparsity is that of the file, which was read back. Peaks of memory are of
    the run with all that it resumed, of a GPU's memory where windows are trained in that; those of phases are missing
    where the system cannot tell them apart. `walk_peak_host_bytes` is that of the CPU's memory in a walk on a GPU.
    """

    nats: dict[str, float]
    relative_error: dict[str, float]
    typical_error: dict[str, float]
    protocol: EvaluationProtocol
    model: dict[str, Any]
    recipe: dict[str, str]
    sparsity: dict[str, Any]
    windows: Sequence[WindowResult]
    seconds: dict[str, float]
    peak_memory_bytes: int
    walk_peak_memory_bytes: int
    phase_peak_memory_bytes: dict[str, int]
    predicted: dict[str, float]
    tokens: dict[str, int]
    seed: int
    compute: dict[str, Any]
    provenance: dict[str, Any]
    walk_peak_host_bytes: int | None = None

    @property
    def perplexity(self) -> dict[str, float]:
        """Perplexity of each state."""
        return {state: perplexity_of(nats) for state, nats in self.nats.items()}

    @property
    def gap_recovered(self) -> float | None:
        """Share of the perplexity that pruning cost and reconstruction won back; None where there is none to tell."""
        return share_recovered(**self.perplexity)

    def as_dict(self) -> dict[str, Any]:
        """The content of results.json; None for what is not finite, which JSON has no number for."""
        gaps = {"gap_recovered": self.gap_recovered, "gap_recovered_nats": share_recovered(**self.nats)}
        return without_nan({"perplexity": self.perplexity} | asdict(self) | gaps | {"versions": versions()})

    def save(self, path: Path) -> None:
        """Write results.json, whole or not at all."""
        with replaced(path) as file:
            file.write((json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n").encode())
        sync_folder(path.parent)  # before the commits that these come from are removed


def model_facts(name: str, parameters: int, prunable: int) -> dict[str, Any]:
    """A dense model, by its name and its numbers of parameters."""
    return {
        "name": name,
        "parameters": parameters,
        "prunable_parameters": prunable,
        "covered": prunable / parameters,
    }


def token_counts(samples: Samples) -> dict[str, int]:
    """Tokens that weights are trained on, by their use: calibration, of windows too; retraining, of all layers only."""
    own = samples.num_retraining_tokens
    return {"calibration": samples.num_tokens} | ({"retraining": own} if own else {})


def compute_facts(compute: Compute) -> dict[str, Any]:
    """Where and how precisely a run computed; where the precision was measured, seconds of a step of a layer by it."""
    return {"device": compute.device.type, "precision": compute.precision, "measured_seconds": dict(compute.measured)}


def sparsity(masks: Masks, zeros: Mapping[str, int], parameters: int) -> dict[str, Any]:
    """Share of zeros in the file: of all parameters, of what was prunable, and of each matrix.

    Args:
        masks: The masks.
        zeros: Zeros in the file, by matrix.
        parameters: All parameters of the model.
    """
    sizes = {name: masks[name].numel() for name in masks}
    return {
        "total": sum(zeros.values()) / parameters,
        "prunable": sum(zeros.values()) / max(1, sum(sizes.values())),
        "by_matrix": {name: zeros[name] / sizes[name] for name in masks},
    }


def table(results: Results, run: Path) -> Table:
    """The last thing on the terminal."""
    shown = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    shown.add_column(style="bold")
    shown.add_column()
    for key, value in results.perplexity.items():
        text = f"{value:.2f}" if math.isfinite(value) else f"not finite ({results.nats[key]:.4g} nats per token)"
        shown.add_row(f"perplexity {key}", text)
    gap, known = results.gap_recovered, all(map(math.isfinite, results.perplexity.values()))
    none = "none to recover" if known else "not known: a perplexity is not finite"
    shown.add_row("gap recovered", none if gap is None else f"{gap:.0%}")
    mean, typical = (
        f"{errors['pruned']:.3g} -> {errors['reconstructed']:.3g}"
        for errors in (results.relative_error, results.typical_error)
    )
    shown.add_row("relative error", f"{mean}, typical token {typical} (final hidden states, evaluation)")
    sparsities = results.sparsity
    shown.add_row("sparsity", f"{sparsities['prunable']:.1%} of prunable, {sparsities['total']:.1%} of all parameters")
    phases = ", ".join(f"{name} {value:.1f}" for name, value in results.seconds.items() if name != "total")
    shown.add_row("seconds", f"{phases}")
    shown.add_row("", f"{duration(results.seconds['total'])} in total")
    shown.add_row("peak memory", in_gb(results.peak_memory_bytes))
    for about, text in remarks(results.windows):
        shown.add_row(escape(about), escape(text))
    shown.add_row("files", escape(f"{run}/  (checkpoint/, report.html, results.json)"))
    shown.add_row("curves", escape(f"tensorboard --logdir {shlex.quote(str(run.parent))}"))
    return shown


def remarks(windows: Sequence[WindowResult]) -> list[tuple[str, str]]:
    """Remarks on windows, and what each is about: one for all windows of which there is the same to say."""
    same: dict[str, list[str]] = {}
    for window in windows:
        if window.note:
            same.setdefault(window.note, []).append(window.name)
    found = [(names[0] if len(names) == 1 else f"{len(names)} windows", note) for note, names in same.items()]
    lost = [window for window in windows if window.lost_by_rounding > _NOTED]
    if lost:
        worst = max(lost, key=lambda window: window.lost_by_rounding)
        text = (
            f"to the model's dtype took over {_NOTED:.0%} of what training gained in {len(lost)} of {len(windows)} "
            f"windows, {worst.lost_by_rounding:.0%} in {worst.name}; model.dtype=float32 keeps it"
        )
        found.append(("rounding", text))
    return found
