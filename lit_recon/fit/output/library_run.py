"""Reconstruction: what the library has done to a model object, and its folder with the files of a run."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lit_recon.data.source import Samples
from lit_recon.evaluate.perplexity import EvaluationProtocol, share_recovered
from lit_recon.fit.output.results import model_facts, sparsity, token_counts
from lit_recon.pruning.masks import Masks
from lit_recon.reconstruction.window_result import WindowResult
from lit_recon.report.page import write_report
from lit_recon.system.atomic_files import replaced
from lit_recon.system.device import Compute
from lit_recon.system.finite import without_nan
from lit_recon.system.memory import peak_memory_bytes
from lit_recon.system.versions import versions

STATES = ("dense", "pruned", "reconstructed")


@dataclass(frozen=True)
class Reconstruction:
    """What was done to a model.

    Attributes:
        windows: The result of each window, in order: its errors, and whether its reconstruction was accepted.
        masks: By the name of each pruned matrix, its boolean mask (True = kept).
        by_magnitude: Labels of the experts that saw no token and were scored by magnitude.
        recipe: What was done, in the words of the settings.
        seconds: Per phase, and in total.
        seed: Of everything that was drawn.
    """

    windows: list[WindowResult]
    masks: Masks
    by_magnitude: list[str]
    recipe: dict[str, str]
    seconds: dict[str, float]
    seed: int

    def report(
        self, folder: str | Path, model: PreTrainedModel, samples: Samples, *, perplexity: Mapping[str, float]
    ) -> Path:
        """Write results.json, the masks and report.html, with which `python -m lit_recon.report` compares runs.

        Args:
            folder: A new folder, or an empty one.
            model: The reconstructed model.
            samples: The samples that it was made with.
            perplexity: That of the "dense", the "pruned" and the "reconstructed" model on samples.evaluation_ST.

        Returns:
            The page.

        Raises:
            ValueError: The folder holds something, a perplexity is missing, or a pruned weight is not zero.
        """
        folder = Path(folder)
        results = _results(self, folder, model, samples, perplexity)
        folder.mkdir(parents=True, exist_ok=True)
        self.masks.save(folder / "masks.safetensors")
        with replaced(folder / "results.json") as file:
            file.write((json.dumps(without_nan(results), indent=2, allow_nan=False) + "\n").encode())
        return write_report(folder)


def _results(
    done: Reconstruction, folder: Path, model: PreTrainedModel, samples: Samples, perplexity: Mapping[str, float]
) -> dict[str, Any]:
    """The content of results.json; a ValueError where it cannot be told, or not there."""
    if missing := [state for state in STATES if not isinstance(perplexity.get(state), (int, float))]:
        raise ValueError(f"perplexity: expected one for each of {', '.join(STATES)}; {', '.join(missing)} is missing.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: there is something already; give the path of a new folder.")
    try:
        zeros = done.masks.count_zeros(model)
    except RuntimeError as error:
        raise ValueError(f"{error} Give the model as prune_and_reconstruct left it.") from error
    nats = {state: math.log(perplexity[state]) if perplexity[state] > 0 else math.nan for state in STATES}
    compute = Compute.default()
    parameters, prunable = model.num_parameters(), sum(done.masks[name].numel() for name in done.masks)
    return {
        "perplexity": {state: perplexity[state] for state in STATES},
        "nats": nats,
        "gap_recovered": share_recovered(**{state: perplexity[state] for state in STATES}),
        "gap_recovered_nats": share_recovered(**nats),
        "protocol": asdict(
            EvaluationProtocol.from_tokens(
                samples.evaluation_ST,
                dataset=samples.evaluation_description or samples.description,
                split=samples.evaluation_split,
                opening=samples.opening,
                given=samples.num_given,
                precision=compute.precision,
            )
        ),
        "model": model_facts(model.config.name_or_path or type(model).__name__, parameters, prunable),
        "recipe": dict(done.recipe),
        "sparsity": sparsity(done.masks, zeros, parameters),
        "windows": [asdict(window) for window in done.windows],
        "seconds": dict(done.seconds),
        "peak_memory_bytes": peak_memory_bytes(compute.device),
        "tokens": token_counts(samples),
        "seed": done.seed,
        "versions": versions(),
    }
