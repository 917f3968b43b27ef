"""GGUF files: dequantised by transformers into a safetensors folder, by a release that reads their tokenizers right."""

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_recon.system.quiet_libraries import no_progress_bars

HEADER = "gguf.json"  # next to the model that was dequantised: what its file said of itself


def check_transformers(oldest: str) -> None:
    """Refuse releases of transformers that read the weights of a GGUF file right and its tokenizer wrong.

    Args:
        oldest: The first release that reads the tokenizer of the file right.

    Raises:
        ValueError: An older one is installed.
    """
    if Version(transformers.__version__) < Version(oldest):
        raise ValueError(
            f"it is a GGUF file, whose tokenizer transformers {transformers.__version__} misreads; upgrade it to "
            f"{oldest} or newer (5.23 and newer need Python 3.11), or use a model that is no GGUF file: model=hf "
            "model.name=<folder or Hub id>"
        )


def dequantise(file: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file as a safetensors folder, in float32, which holds the values exactly."""
    location: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**location)
    if hasattr(transformers, "GgufConfig"):  # releases that have it may keep the weights quantised by default
        location["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with no_progress_bars(), redirect_stderr(io.StringIO()):  # the bar of its GGUF reader obeys no setting
        model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / HEADER).write_text(json.dumps(header(file), indent=1), encoding="utf-8")


def header(file: Path) -> dict[str, str | int]:
    """What a GGUF file says of itself: name, size, kind of quantisation and so on (its fields `general.*`)."""
    fields = gguf.GGUFReader(file).fields
    found = {name: field.contents() for name, field in fields.items() if name.startswith("general.")}
    return {name: value for name, value in found.items() if isinstance(value, str | int)}


def title(folder: Path) -> str | None:
    """Name, size and quantisation of a dequantised model, as its GGUF file gave them; None where it gave none."""
    try:
        said = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name, size, kind = (said.get(f"general.{key}") for key in ("name", "size_label", "file_type"))
    kinds = {member.value: member.name.partition("_")[2] for member in gguf.LlamaFileType}
    parts = [name, size if size and size not in str(name) else None, kinds.get(kind)]
    return ", ".join(str(part) for part in parts if part) or None
