"""Folder of what the library has done to a model object: results.json, masks and page of a run of the command."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel

from lit_recon.data.source import Samples
from lit_recon.evaluate.perplexity import EvaluationProtocol, share_recovered
from lit_recon.fit.output.results import sparsity
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
class Done:
    """What was done to a model; the fields are those of fit.library.Reconstruction."""

    windows: Sequence[WindowResult]
    masks: Masks
    recipe: Mapping[str, str]
    seconds: Mapping[str, float]
    seed: int


def write_run(
    folder: Path, done: Done, model: PreTrainedModel, samples: Samples, perplexity: Mapping[str, float]
) -> Path:
    """Write the folder; the page that a person looks at.

    Args:
        folder: A new folder, or an empty one.
        done: What was done.
        model: The model that it was done to.
        samples: The samples that it was done with.
        perplexity: Of each of STATES, on the evaluation samples.

    Raises:
        ValueError: The folder holds something, a perplexity is missing, or a pruned weight is not zero.
    """
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
    results = {
        "perplexity": {state: perplexity[state] for state in STATES},
        "nats": nats,
        "gap_recovered": share_recovered(**{state: perplexity[state] for state in STATES}),
        "gap_recovered_nats": share_recovered(**nats),
        "protocol": asdict(
            EvaluationProtocol.from_tokens(
                samples.evaluation_ST,
                dataset=samples.evaluation_description or samples.description,
                opening=samples.opening,
                given=samples.num_given,
                precision=compute.precision,
            )
        ),
        "model": {
            "name": model.config.name_or_path or type(model).__name__,
            "parameters": parameters,
            "prunable_parameters": prunable,
            "covered": prunable / parameters,
        },
        "recipe": dict(done.recipe),
        "sparsity": sparsity(done.masks, zeros, parameters),
        "windows": [asdict(window) for window in done.windows],
        "seconds": dict(done.seconds),
        "peak_memory_bytes": peak_memory_bytes(compute.device),
        "tokens": {"calibration": samples.num_tokens},
        "seed": done.seed,
        "versions": versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    done.masks.save(folder / "masks.safetensors")
    with replaced(folder / "results.json") as file:
        file.write((json.dumps(without_nan(results), indent=2, allow_nan=False) + "\n").encode())
    return write_report(folder)
