"""Measurement of the dense model, made once for all runs that share it: kept in the cache folder.

Its likelihoods and final hidden states depend on the model, the evaluation text, the precision, the machine and the
code alone, not on how the model is pruned or trained; a sweep measures the dense model once.
"""

import hashlib
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lit_recon.evaluate.evaluator import Evaluator, Measured
from lit_recon.system.cache import place_of, remembered

FILE = "measured.safetensors"
KEPT = 32  # measurements; each has a few samples' final states, megabytes


@dataclass(frozen=True)
class DenseMeasure:
    """Measures a dense model, or reads what an earlier run measured.

    Attributes:
        evaluator: Measures it.
        model: What the model, the code and the machine are; a value that JSON takes.
    """

    evaluator: Evaluator
    model: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The place of the measurement in the cache."""
        samples = self.evaluator.samples
        tokens_ST = samples.evaluation_ST.to(torch.int64)
        decides = {
            "model": self.model,
            "tokens": hashlib.sha256(tokens_ST.numpy().tobytes()).hexdigest(),
            "shape": tuple(tokens_ST.shape),
            "given": samples.num_given,
            "compared": self.evaluator.num_compared,
            "tokens_per_batch": self.evaluator.tokens_per_batch,
            "precision": self.evaluator.compute.precision,
        }
        return place_of("measured", decides)

    @property
    def is_known(self) -> bool:
        """Whether an earlier run has measured it."""
        return (self.folder / FILE).is_file()

    def of(self, model: PreTrainedModel) -> Measured:
        """The measurement of a model, which is the dense one."""
        folder = self.folder
        found = remembered(folder, lambda: self.evaluator.measure(model), write=_write, read=_read)
        _forget_old(folder.parent)
        return found


def _write(folder: Path, measured: Measured) -> None:
    """Write a measurement into a folder."""
    by_sample = torch.tensor(measured.by_sample, dtype=torch.float64)
    save_file({"by_sample": by_sample, "states": measured.states_STD.cpu().contiguous()}, folder / FILE)


def _read(folder: Path) -> Measured:
    """What was written."""
    kept = load_file(folder / FILE)
    return Measured(kept["by_sample"].tolist(), kept["states"])


def _forget_old(folder: Path) -> None:
    """Remove all but the newest measurements."""
    with suppress(OSError):  # there is no cache; another run may remove them too
        found = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        for old in found[:-KEPT]:
            shutil.rmtree(old)
            old.with_name(f"{old.name}.lock").unlink(missing_ok=True)
