"""GGUF files: dequantised by transformers into a safetensors folder, by a release that reads their tokenizers right."""

import io
from contextlib import redirect_stderr
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_recon.system.quiet_libraries import no_progress_bars

# With SmolLM2, 5.0 to 5.5 lose text; with Gemma 3, 5.6 to 5.16 cut words that are tokens, 5.20 to 5.22 leave BOS out.
OLDEST_TRANSFORMERS = (5, 23)


def check_transformers() -> None:
    """Refuse releases of transformers that read the weights of a GGUF file right and its tokenizer wrong.

    Raises:
        ValueError: One of them is installed.
    """
    found = transformers.__version__
    if tuple(int(number) for number in found.split(".")[:2]) < OLDEST_TRANSFORMERS:
        oldest = ".".join(str(number) for number in OLDEST_TRANSFORMERS)
        raise ValueError(
            f"it is a GGUF file, whose tokenizer transformers {found} may misread; upgrade it to {oldest} or newer "
            "(for Python 3.11 or newer), or use a model that is no GGUF file: model=hf model.name=<folder or Hub id>"
        )


def dequantise(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file as a safetensors folder, in float32, which holds the values exactly."""
    location = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**location)
    dequantised = transformers.GgufConfig(dequantize=True)  # transformers may keep the weights quantised unless told
    with no_progress_bars(), redirect_stderr(io.StringIO()):  # the bar of its GGUF reader obeys no setting
        model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32, quantization_config=dequantised)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
