"""Tokenizer of bytes, and texts that tests of data write, read and compare."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_recon.data.source import Part, TextSource

PARTS: tuple[Part, ...] = ("calibration", "held_out", "evaluation")
EOS, BOS = 256, 257  # after the 256 bytes


def byte_tokenizer(*, eos: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte; with `bos` it opens each text with a token, as Llama's and Gemma's do."""
    # ByteLevel writes bytes as letters; the letters in the order of the bytes make the ids those of ASCII.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(["<eos>", "<bos>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = {"eos_token": "<eos>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", **names)


def ascii_ids(text: str) -> list[int]:
    return list(text.encode())


def texts(pieces: torch.Tensor) -> list[str]:
    return ["".join("|" if token == EOS else chr(token) for token in piece) for piece in pieces.tolist()]


def all_text(source: TextSource) -> dict[Part, list[str]]:
    return {part: list(source.documents(part)) for part in PARTS}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@contextmanager
def library_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Capture what libraries log: their loggers do not reach the root logger, and hold an earlier stderr."""
    loggers = [logging.getLogger(name) for name in ("transformers", "datasets", "huggingface_hub")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)
