"""GGUF files: dequantised by transformers into a safetensors folder, by a release that reads their tokenizers right."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_recon.system.quiet_libraries import no_progress_bars


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


def dequantise(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file as a safetensors folder, in float32, which holds the values exactly."""
    location: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**location)
    if hasattr(transformers, "GgufConfig"):  # releases that have it may keep the weights quantised by default
        location["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with no_progress_bars(), redirect_stderr(io.StringIO()):  # the bar of its GGUF reader obeys no setting
        model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
