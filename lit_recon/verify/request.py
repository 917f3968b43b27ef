"""Request: what a folder is asked, checked before torch is loaded, with all problems in one message.

The folder of a run stands for the checkpoint/ in it, together with its masks.safetensors.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # in the order in which transformers looks for them
MASKS = "masks.safetensors"
TOLERANCE = 0.001  # rows whose width the share does not divide keep a weight more
_PATTERN = re.compile(r"(\d{1,3}):(\d{1,3})")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a folder is asked.

    Attributes:
        folder: Its model files.
        masks: Boolean masks, as lit_recon writes them, whose masked weights must be zero.
        dense: Folder of the dense model that it is compared with.
        pattern: (N, M): at most N of every M consecutive weights along the inputs are not zero.
        sparsity: Least share of zeros, of the matrices together.
        tolerance: How far below it the share may be.
        note: What was made of the folder that the user gave.
    """

    folder: Path
    masks: Path | None = None
    dense: Path | None = None
    pattern: tuple[int, int] | None = None
    sparsity: float | None = None
    tolerance: float = TOLERANCE
    note: str | None = None


def make_request(
    folder: Path,
    *,
    masks: Path | None = None,
    dense: Path | None = None,
    pattern: str | None = None,
    sparsity: float | None = None,
    tolerance: float | None = None,
) -> Request:
    """The request of a command line.

    Raises:
        ValueError: With all that is wrong, a line each: folders without safetensors, files that are not there, numbers
            that mean nothing.
    """
    model, masks, note = _in_run(folder, masks)
    problems = [problem for path in filter(None, (model, dense)) for problem in _folder_problems(path)]
    if masks is not None and not masks.is_file():
        problems.append(f"--masks {masks}: no such file; expected the {MASKS} of a run.")
    numbers = _PATTERN.fullmatch(pattern) if pattern is not None else None
    wanted = (int(numbers[1]), int(numbers[2])) if numbers else None
    if pattern is not None and (wanted is None or not 0 < wanted[0] < wanted[1]):
        problems.append(f"--pattern {pattern}: expected N:M with 0 < N < M (keep N of every M weights), such as 2:4.")
    if sparsity is not None and not 0 < sparsity <= 1:
        problems.append(f"--sparsity {sparsity}: expected a share of zeros above 0 and up to 1, such as 0.5.")
    if tolerance is not None and not 0 <= tolerance < 1:
        problems.append(f"--tolerance {tolerance}: expected a share of at least 0 and below 1, such as {TOLERANCE}.")
    if tolerance is not None and sparsity is None:
        problems.append("--tolerance is that of --sparsity; give both.")
    if problems:
        raise ValueError("\n".join(problems))
    return Request(
        folder=model,
        masks=masks,
        dense=dense,
        pattern=wanted,
        sparsity=sparsity,
        tolerance=TOLERANCE if tolerance is None else tolerance,
        note=note,
    )


def _in_run(folder: Path, masks: Path | None) -> tuple[Path, Path | None, str | None]:
    """The model's folder and the masks, where the folder is that of a run; and what is to be said of it."""
    if any((folder / name).exists() for name in WEIGHTS) or not (folder / "checkpoint").is_dir():
        return folder, masks, None
    if masks is not None:
        looked_at = "its checkpoint/ is looked at"
    elif (folder / MASKS).is_file():
        masks, looked_at = folder / MASKS, f"its checkpoint/ and {MASKS} are looked at"
    else:
        looked_at = f"its checkpoint/ is looked at; it has no {MASKS}, which a run writes when it ends"
    return folder / "checkpoint", masks, f"{folder} is the folder of a run: {looked_at}"


def _folder_problems(folder: Path) -> Iterator[str]:
    """Why a folder's weights cannot be looked at, and what to do about it."""
    if folder.is_file():
        yield f"{folder} is a file; give the folder that config.json and the weights are in."
    elif not folder.is_dir():
        yield f"{folder}: no such folder; for a model of the Hub: hf download <id> --local-dir <folder>"
    elif not any((folder / name).is_file() for name in WEIGHTS):
        yield f"{folder}: {_instead(folder)}"


def _instead(folder: Path) -> str:
    """What a folder without model.safetensors holds instead, and the way from there to safetensors."""
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_model.safetensors" in names or "adapter_model.bin" in names:
        return (
            "an adapter without the model that it changes; merge them first (model.merge_and_unload() of peft, then "
            "save_pretrained) and give that folder."
        )
    if any(name.startswith("pytorch_model") for name in names):
        return (
            "weights in pytorch_model.bin, which only unpickling can read; load the model and save it again as "
            "safetensors: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return f"weights of llama.cpp ({ggufs[0]}), which are quantised; give the safetensors that they were made from."
    others = [name for name in names if name.endswith(".safetensors")] or names
    held = f"it holds {', '.join(others[:6])}{', ...' if len(others) > 6 else ''}" if others else "it is empty"
    return f"no {' or '.join(WEIGHTS)}, of which transformers reads a model; {held}."
