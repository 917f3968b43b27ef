"""Packing of documents into token sequences of one length, without truncation.

`fixed` concatenates the tokens of all documents, the tokenizer's end-of-text token between two, and cuts them into
pieces of exactly `length` tokens. `documents` cuts each document by itself, the end-of-text token after it, and pads
the rest. What a tokenizer puts before a text by itself, its opening, such as BOS or `[gMASK] <sop>`, is at the start of
every piece, since the model expects it there. The pieces are cached on disk.

Shapes: P pieces, S samples, T tokens.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Literal
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_recon.system.tensor_files import write_tensors

log = logging.getLogger(__name__)

_DAY = 86400  # seconds

Packing = Literal["fixed", "documents"]
Bos = bool | Literal["auto"]

PADDING = -100  # token id of a position that holds no text; -100 is torch's ignore_index
LEAST_TOKENS = 2  # of a padded piece, besides its opening: one to see and one to predict
BATCH_CHARACTERS = 1 << 20  # per call of the tokenizer, which needs some hundred bytes of memory for each
CACHE_VERSION = 2  # raised when the code below changes the pieces: the key does not cover it


def pack(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    cache: Path,
    packing: Packing = "fixed",
    bos: Bos = "auto",
) -> Tensor:
    """Cut documents into pieces of `length` tokens, in their order, or read the pieces from the cache.

    Args:
        documents: Texts without a common context.
        tokenizer: Fast or slow.
        length: Tokens of a piece, opening included.
        cache: Folder that keeps the result, in `tokens/`, keyed by text, tokenizer, length and packing.
        packing: `fixed`: pieces run on from one document into the next. `documents`: each piece is of one document;
            the last piece of a document has the end-of-text token if the tokenizer has one and the piece has room.
        bos: See `find_opening`.

    Returns:
        int32, (P, length). What does not fill a piece is dropped if `fixed`; if `documents`, it is padded on the right
        with PADDING, and dropped only where it has less than two tokens, end-of-text included and the opening not.
    """
    opening = find_opening(tokenizer, bos)
    assert len(opening) < length, f"{len(opening)} tokens open pieces of {length}"
    stride = length - len(opening)
    least = stride if packing == "fixed" else min(LEAST_TOKENS, stride)

    def make() -> Tensor:
        return _cut(_runs(documents, tokenizer, packing, opening), opening=opening, stride=stride, least=least)

    key = _key(documents, tokenizer, opening=opening, length=length, packing=packing)
    return cached_pieces(key, make, length=length, cache=cache)


def token_stream(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, cache: Path, bos: Bos = "auto"
) -> Tensor:
    """All tokens that `fixed` pieces are cut from, without what opens each piece: int64, (T), from the cache or made.

    Args:
        documents: Texts without a common context; the end-of-text token stands between two.
        tokenizer: Fast or slow.
        cache: Folder that keeps the result, in `tokens/`.
        bos: See `find_opening`.
    """
    opening = find_opening(tokenizer, bos)

    def make() -> Tensor:
        return _cut(_runs(documents, tokenizer, "fixed", opening), opening=[], stride=1, least=1)

    key = _key(documents, tokenizer, opening=opening, length=1, packing="fixed")  # pieces are longer than their opening
    return cached_pieces(key, make, length=1, cache=cache)[:, 0].long()


def cached_pieces(key: str, make: Callable[[], Tensor], *, length: int, cache: Path) -> Tensor:
    """Pieces of `length` tokens from the cache, or made and kept there.

    Args:
        key: Hash of all that decides them.
        make: Makes them: int32, (P, length).
        length: Tokens of a piece.
        cache: Folder that keeps them, in `tokens/`.
    """
    path = cache / "tokens" / f"{key}.safetensors"
    pieces_PT = _read(path, key, length)
    if pieces_PT is None:
        pieces_PT = make()
        _write(path, key, pieces_PT)
    return pieces_PT


def draw(pieces_PT: Tensor, number: int, *, seed: int) -> Tensor:
    """Draw `number` of the pieces without replacement: int64, (S, T). The seed alone decides which, and their order."""
    assert number <= len(pieces_PT), f"{number} of {len(pieces_PT)} pieces"
    generator = torch.Generator().manual_seed(seed)
    return pieces_PT[torch.randperm(len(pieces_PT), generator=generator)[:number]].long()


def find_opening(tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> list[int]:
    """Tokens at the start of every piece.

    Args:
        tokenizer: Of the model.
        bos: "auto": all that the tokenizer puts before a text by itself, often BOS, often nothing. True: BOS before
            that, where it is not in it. False: nothing.

    Raises:
        ValueError: BOS is asked for and the tokenizer has none.
    """
    if bos is False:
        return []
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    start = next((start for start in range(len(whole)) if whole[start : start + len(bare)] == bare), 0)
    opening: list[int] = whole[:start]
    if bos is True and tokenizer.bos_token_id is None:
        raise ValueError("data.bos=true: the model's tokenizer names no BOS token; leave it out")
    return [tokenizer.bos_token_id, *opening] if bos is True and tokenizer.bos_token_id not in opening else opening


def _runs(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, packing: Packing, opening: Sequence[int]
) -> list[list[int]]:
    """Runs of tokens to cut: one per document, end-of-text after it, or one of all documents, end-of-text between.

    An opening that stands in a document's text, as chat templates write it, is not repeated in its tokens.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    size = len(opening)
    tokens = _tokens(documents, tokenizer)
    runs = [(ids[size:] if size and ids[:size] == opening else ids) + end for ids in tokens]
    if packing == "documents":
        return runs
    joined = list(chain.from_iterable(runs))
    return [joined[: len(joined) - len(end)]]


def _cut(runs: Sequence[list[int]], *, opening: list[int], stride: int, least: int) -> Tensor:
    """Pieces: opening, then `stride` tokens of a run; a rest is padded, or dropped if it is below `least` tokens."""
    texts = [run[start : start + stride] for run in runs for start in range(0, len(run), stride)]
    rows = [opening + text + [PADDING] * (stride - len(text)) for text in texts if len(text) >= least]
    return torch.tensor(rows, dtype=torch.int32).view(len(rows), len(opening) + stride)


def _tokens(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of each document."""
    tokens: list[list[int]] = []
    with _no_parallelism():
        for batch in _batches(documents):
            # verbose=False: no warning that a document is longer than the model's context, since it is cut into pieces.
            tokens += tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


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

    Its threads do not survive a fork: it would warn at each later fork, of a DataLoader's workers for example. They
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


def _key(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    opening: Sequence[int],
    length: int,
    packing: Packing,
) -> str:
    """SHA-256 of everything that decides the pieces."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer has no description of itself
        described = f"{type(tokenizer)} {sorted(tokenizer.get_vocab().items())}"
    else:
        described = backend.to_str()
    settings = f"{CACHE_VERSION} {packing} {length} {list(opening)} {tokenizer.eos_token_id}"
    digest = hashlib.sha256(settings.encode())
    for text in (described, *documents):
        encoded = text.encode()
        digest.update(f"\0{len(encoded)}\0".encode())  # so that two documents are not one
        digest.update(encoded)
    return digest.hexdigest()


def _checksum(key: str, pieces_PT: Tensor) -> str:
    return hashlib.sha256(key.encode() + pieces_PT.numpy().tobytes()).hexdigest()


def _read(path: Path, key: str, length: int) -> Tensor | None:
    """Cached pieces; None if they are absent or damaged."""
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
        _remove_old_partials(path.parent)
        try:
            with partial.open("xb") as file:  # in the mode of new files: others may use the cache too
                write_tensors(file, {"pieces": pieces_PT}, {"checksum": _checksum(key, pieces_PT)})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        log.warning("tokens cannot be cached in %s (%s): the next run makes them again", path.parent, error)


def _remove_old_partials(folder: Path) -> None:
    """Remove what processes that were killed have left; younger files may be another process's."""
    for path in folder.glob("*.partial"):
        if time.time() - path.stat().st_mtime > _DAY:
            path.unlink(missing_ok=True)
