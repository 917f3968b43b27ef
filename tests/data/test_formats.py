"""The same rows come from every format, compressed or not."""

import bz2
import csv
import gzip
import json
import lzma
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lit_recon.data.formats import rows, text_format

ROWS = [{"text": "first, \u00e9", "id": "1"}, {"text": "second\nline", "id": "2"}]


def write(path: Path) -> Path:
    """The rows in the format of a path."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "id"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_rows_are_those_that_were_written(tmp_path, suffix):
    assert list(rows(write(tmp_path / f"rows{suffix}"))) == ROWS


@pytest.mark.parametrize("text", [json.dumps(ROWS), json.dumps(ROWS, indent=2), "\n".join(map(json.dumps, ROWS))])
def test_a_json_file_is_an_array_or_lines(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    assert list(rows(tmp_path / "rows.json")) == ROWS


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_files_are_read_also_in_several_pieces(tmp_path, suffix, compress):
    path = tmp_path / f"rows.jsonl.{suffix}"
    path.write_bytes(b"".join(compress(json.dumps(row).encode() + b"\n") for row in ROWS))
    assert list(rows(path)) == ROWS
    assert text_format(path) == ".jsonl"


def test_zst_files_are_read_also_in_several_pieces(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(json.dumps(row).encode() + b"\n") for row in ROWS))
    assert list(rows(path)) == ROWS


def test_without_zstandard_a_zst_file_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "rows.jsonl.zst").write_bytes(b"")
    with pytest.raises(ValueError, match=r"needs the package zstandard \(pip install zstandard\)"):
        next(rows(tmp_path / "rows.jsonl.zst"))


def test_line_ends_and_the_mark_of_utf8_are_no_text(tmp_path):
    (tmp_path / "dos.txt").write_bytes("\ufefffirst\r\nsecond\r\n\r\nlast".encode())
    assert [row["text"] for row in rows(tmp_path / "dos.txt")] == ["first", "second", "", "last"]


def test_a_csv_cell_may_be_long_and_a_row_may_have_too_many_cells(tmp_path):
    (tmp_path / "rows.csv").write_text(f"text\n{'x' * 200_000},more\n")
    assert list(rows(tmp_path / "rows.csv")) == [{"text": "x" * 200_000}]
