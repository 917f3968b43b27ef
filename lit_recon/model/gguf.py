"""GGUF files: dequantised by transformers into a safetensors folder, once it is known to read the tokenizer right."""

import io
from contextlib import redirect_stderr
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lit_recon.system.quiet_libraries import no_progress_bars


def dequantise(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file as a safetensors folder, in float32, which holds the values exactly.

    Raises:
        ValueError: This release of transformers misreads its tokenizer.
    """
    location: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**location)
    if problem := _misread(tokenizer, gguf):
        raise ValueError(f"transformers {transformers.__version__} misreads its tokenizer ({problem}); upgrade it")
    if hasattr(transformers, "GgufConfig"):  # releases that have it may keep the weights quantised unless told
        location["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with no_progress_bars(), redirect_stderr(io.StringIO()):  # the bar of its GGUF reader obeys no setting
        model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _misread(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> str | None:
    """What transformers got wrong of a GGUF file's tokenizer; there were releases that read only the weights right."""
    text = "def area(r):\n    return 3.14159 * r ** 2  # naïve"
    if str(tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)).strip() != text:
        return "text is lost"  # SmolLM2 with 5.0 to 5.5
    opening = tokenizer.encode("a", add_special_tokens=False)[-1]  # before a word, whose blank may be lost in front
    sample = range(0, len(tokenizer), 1 + len(tokenizer) // 1000)
    words = [(token, str(tokenizer.decode([opening, token]))) for token in sample]
    words = [(token, word) for token, word in words if word[:2] == "a " and word[2:].isalpha() and word.isascii()]
    whole = [token == tokenizer.encode(word, add_special_tokens=False)[-1] for token, word in words]
    if sum(whole) < 0.5 * len(whole):  # Gemma 3 with 5.6 to 5.16, merges in a wrong order: 0.02 instead of 1.0
        return "words that are tokens are cut up"
    if _opens_with_bos(gguf) and tokenizer.encode("a")[0] != tokenizer.bos_token_id:
        return "the BOS token is left out"  # Gemma 3 with 5.20 to 5.22: perplexity 48 instead of 18
    return None


def _opens_with_bos(gguf: Path) -> bool:
    """What a GGUF file says of its tokenizer. Found by its bytes: gguf.GGUFReader takes 10 s for 262144 tokens."""
    key = b"tokenizer.ggml.add_bos_token" + b"\7\0\0\0"  # 7: the value, which follows, is a bool
    with gguf.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        found = content.find(key)
        return found >= 0 and content[found + len(key)] == 1
