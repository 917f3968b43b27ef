"""Formats of text files: rows of .txt, .md, .json, .jsonl, .csv and .parquet files, also compressed.

The standard library and pyarrow read them, row by row. The readers of `datasets` would need a cache folder that can be
written even to stream a file, fail on an empty one, and end the process where JSON is nested too deeply.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet

BATCH_ROWS = 256  # of a .parquet file that are in memory at once
CELL = 2**31 - 1  # characters of a .csv file's cell; by default 131072
Rows = Iterator[Mapping[str, Any]]


def rows(path: Path) -> Rows:
    """Rows of a file by column; the rows of .txt and .md files are their lines, in the column `text`.

    Raises:
        ValueError: The file cannot be read; the message says why, not which.
    """
    try:
        yield from FORMATS[text_format(path)](path)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(path, error)) from error
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    except Exception as error:  # compressed, damaged and strange files raise as many kinds as there are formats
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def text_format(path: Path) -> str:
    """Suffix that says how a file is read, such as `.txt` for `notes.TXT.gz`."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def is_plain(path: Path) -> bool:
    """Whether a file is one text, without rows or columns."""
    return text_format(path) in (".txt", ".md")


def _plain(path: Path) -> Rows:
    return ({"text": line.removesuffix("\n")} for line in _lines(path))


def _json(path: Path) -> Rows:
    """Objects, one per line, or all in one array."""
    lines = ((number, line) for number, line in enumerate(_lines(path), 1) if line.strip())
    number, line = next(lines, (0, "[]"))
    try:
        first = json.loads(line)
    except json.JSONDecodeError:  # an array or object over several lines, or no JSON
        first = json.loads(line + "".join(line for _, line in lines))
    for row in first if isinstance(first, list) else [first]:
        yield _object(row, "the array")
    for number, line in lines:
        try:
            row = json.loads(line.strip())  # so that the column of an error is that of the line
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON: {error.msg} at column {error.colno}") from error
        yield _object(row, f"line {number}")


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f'{place} holds {type(row).__name__}; each row is an object such as {{"text": "..."}}')
    return row


def _csv(path: Path) -> Rows:
    csv.field_size_limit(CELL)
    for row in csv.DictReader(_lines(path), strict=True):
        row.pop(None, None)  # type: ignore[call-overload]  # cells without a column
        yield row


def _parquet(path: Path) -> Rows:
    with _opened(path) as file:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(BATCH_ROWS):
            yield from batch.to_pylist()


def _lines(path: Path) -> Iterator[str]:
    with _opened(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig") as file:
        for line in file:
            if "\0" in line:
                raise ValueError(f"it holds NUL characters: UTF-16, or no text at all; {_remedy(path, 'UTF-16')}")
            yield line


def _opened(path: Path) -> BinaryIO:
    return COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb")


def _open_zst(path: Path, _: str) -> BinaryIO:
    try:
        import zstandard  # not at the top: few have it
    except ImportError as error:
        raise ValueError("needs the package zstandard (pip install zstandard), or unpack it: zstd -d") from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # what --long=31 has packed
    return decompressor.stream_reader(path.open("rb"), read_across_frames=True)


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """Message for bytes that are not UTF-8: what they look like, and how they become UTF-8."""
    if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"is UTF-16, not UTF-8; {_remedy(path, 'UTF-16')}"
    if b"\0" in error.object:
        return "holds NUL bytes, so that it is no text in UTF-8; export it as text first"
    byte = error.object[error.start]
    return f"is not UTF-8 (byte 0x{byte:02x}), perhaps Latin-1 or Windows-1252; {_remedy(path, 'LATIN1')}"


def _remedy(path: Path, encoding: str) -> str:
    before, after = (shlex.quote(str(name)) for name in (path, path.with_name(f"utf8-{path.name}")))
    return f"convert it: iconv -f {encoding} -t UTF-8 {before} > {after}"


FORMATS: dict[str, Callable[[Path], Rows]] = {
    ".txt": _plain,
    ".md": _plain,
    ".json": _json,
    ".jsonl": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
COMPRESSIONS: dict[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}
