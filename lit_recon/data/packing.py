"""Packing: documents become token sequences of one length, without padding and without truncation.

The tokens of all documents are concatenated, the tokenizer's end-of-text token between two documents, and cut into
pieces of exactly `length` tokens. A tokenizer that opens a text with a token of its own (BOS) gets that token at the
start of every piece, since the model expects it there. The pieces are cached on disk.

Shapes: P pieces, S samples, T tokens.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

BATCH_CHARACTERS = 1 << 20  # per call of the tokenizer, which needs some hundred bytes of memory for each
CACHE_VERSION = 1  # of what the cached pieces depend on beside their key: the code below


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, length: int, cache: Path) -> Tensor:
    """All pieces that the documents give, in their order.

    Args:
        documents: Texts without a common context.
        tokenizer: Fast or slow.
        length: Tokens of a piece, BOS included.
        cache: Folder that keeps the result, in `tokens/`, keyed by text, tokenizer and length.

    Returns:
        int32, (P, length); the rest that does not fill a piece is dropped.
    """
    opening = _opening(tokenizer)
    key = _key(documents, tokenizer, opening=opening, length=length)
    path = cache / "tokens" / f"{key}.safetensors"
    pieces_PT = _read(path, key, length)
    if pieces_PT is None:
        tokens = _tokens(documents, tokenizer)
        stride = length - len(opening)
        number = len(tokens) // stride
        pieces_PT = torch.tensor(tokens[: number * stride], dtype=torch.int32).view(number, stride)
        pieces_PT = torch.cat([pieces_PT.new_tensor(opening).expand(number, -1), pieces_PT], dim=1)
        _write(path, key, pieces_PT)
    return pieces_PT


def draw(pieces_PT: Tensor, number: int, *, seed: int) -> Tensor:
    """`number` of the pieces without replacement: int64, (S, T). The seed alone decides which, and in which order."""
    assert number <= len(pieces_PT), f"{number} of {len(pieces_PT)} pieces"
    generator = torch.Generator().manual_seed(seed)
    return pieces_PT[torch.randperm(len(pieces_PT), generator=generator)[:number]].long()


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer puts it before a text by itself, else []."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _tokens(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of all documents, the end-of-text token between them if the tokenizer has one."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    with _no_parallelism():
        for batch in _batches(documents):
            # verbose=False: no warning that a document is longer than the model's context; it is cut into pieces.
            for document in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                tokens += document + separator
    return tokens[: len(tokens) - len(separator)]


def _batches(documents: Sequence[str]) -> Iterator[list[str]]:
    """Runs of documents of about BATCH_CHARACTERS; a longer document is a batch of its own."""
    batch: list[str] = []
    size = 0
    for document in documents:
        if batch and size + len(document) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document)
    if batch:
        yield batch


@contextmanager
def _no_parallelism() -> Iterator[None]:
    """Keep a fast tokenizer to one thread, unless the user has decided.

    Its threads do not survive a fork: it would warn at each later one, of a DataLoader's workers for example. They
    would save a third of the time on two cores, once per text, since tokens are cached.
    """
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]


def _key(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, opening: Sequence[int], length: int) -> str:
    """SHA-256 of everything that decides the pieces."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer has no description of itself
        described = f"{type(tokenizer)} {sorted(tokenizer.get_vocab().items())}"
    else:
        described = backend.to_str()
    digest = hashlib.sha256(f"{CACHE_VERSION} {length} {list(opening)} {tokenizer.eos_token_id}".encode())
    for text in (described, *documents):
        encoded = text.encode()
        digest.update(f"\0{len(encoded)}\0".encode())  # so that two documents are not one
        digest.update(encoded)
    return digest.hexdigest()


def _checksum(key: str, pieces_PT: Tensor) -> str:
    return hashlib.sha256(key.encode() + pieces_PT.numpy().tobytes()).hexdigest()


def _read(path: Path, key: str, length: int) -> Tensor | None:
    """The cached pieces; None if they are not there, or not as they were written."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            pieces_PT, metadata = file.get_tensor("pieces"), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        log.warning("cached tokens %s cannot be read (%s): they are made again", path, error)
        return None
    if metadata.get("checksum") != _checksum(key, pieces_PT) or pieces_PT.shape[1:] != (length,):
        log.warning("cached tokens %s are damaged: they are made again", path)
        return None
    return pieces_PT


def _write(path: Path, key: str, pieces_PT: Tensor) -> None:
    """Publish the pieces by one rename, so that a run that reads at the same time finds all or nothing."""
    partial = path.with_name(f"{uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({"pieces": pieces_PT.contiguous()}, partial, metadata={"checksum": _checksum(key, pieces_PT)})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        log.warning("tokens cannot be cached in %s (%s): the next run makes them again", path.parent, error)
