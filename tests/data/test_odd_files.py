"""Odd and hostile text files of all formats: each ends in samples or in one refusal, and writes nothing."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import Ended, letter_tokenizer

from lit_recon.data.files import Files

pytestmark = pytest.mark.slow


def words(size: int, separator: str = "\n\n") -> str:
    """Sentences of random words."""
    draw = random.Random(1)
    sentences = [" ".join("".join(draw.choices("abcdefgh", k=5)) for _ in range(8)) + "." for _ in range(size // 48)]
    return separator.join(sentences)


TEXT = words(6000)
ROWS = [{"text": sentence} for sentence in TEXT.split("\n\n")]
LINES = "\n".join(map(json.dumps, ROWS))
CHAT = "\n".join(json.dumps({"messages": [{"role": "user", "content": row["text"]}]}) for row in ROWS)


def parquet(columns: dict[str, list]) -> bytes:
    with io.BytesIO() as file:
        pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=10)
        return file.getvalue()


COLUMN = parquet({"text": [row["text"] for row in ROWS]})
SAMPLES = ""  # instead of a refusal
# Name, content, and the words of the refusal that it ends in.
ODD: dict[str, tuple[str, str | bytes, str]] = {
    "plain": ("a.txt", TEXT, SAMPLES),
    "line ends of Windows": ("a.txt", TEXT.replace("\n", "\r\n"), SAMPLES),
    "line ends of old Macs": ("a.txt", TEXT.replace("\n", "\r"), SAMPLES),
    "mark of UTF-8": ("a.txt", TEXT.encode("utf-8-sig"), SAMPLES),
    "one line": ("a.txt", words(6000, " "), SAMPLES),
    "one word": ("a.txt", "".join(random.Random(0).choices("abcdefgh", k=6000)), SAMPLES),
    "one line of Chinese": (
        "a.txt",
        "".join(chr(0x4E00 + 7 * i % 20000) + "。" * (i % 9 == 0) for i in range(9000)),
        SAMPLES,
    ),
    "emoji and right to left": ("a.txt", TEXT + "\U0001f600 \u202e \u05d0\u05d1" * 20, SAMPLES),
    "control characters": ("a.txt", TEXT + "".join(map(chr, range(1, 32))) * 5, SAMPLES),
    "many blank lines": ("a.txt", "\n" * 100_000 + TEXT, SAMPLES),
    "Markdown": ("a.md", f"# Title\n\n{TEXT}", SAMPLES),
    "capital suffix": ("A.TXT", TEXT, SAMPLES),
    "a name that needs quotes": ("a 'b' é [1]*?.txt", TEXT, SAMPLES),
    "a name that begins with a dash": ("-a.txt", TEXT, SAMPLES),
    "gz": ("a.txt.gz", gzip.compress(TEXT.encode()), SAMPLES),
    "gz in two pieces": (
        "a.txt.gz",
        gzip.compress(TEXT[:2000].encode()) + gzip.compress(TEXT[2000:].encode()),
        SAMPLES,
    ),
    "bz2": ("a.txt.bz2", bz2.compress(TEXT.encode()), SAMPLES),
    "xz": ("a.jsonl.xz", lzma.compress(LINES.encode()), SAMPLES),
    "jsonl": ("a.jsonl", LINES, SAMPLES),
    "jsonl with blank lines": ("a.jsonl", LINES.replace("\n", "\n\n \n"), SAMPLES),
    "jsonl with rows without text": ("a.jsonl", LINES + '\n{"text": null}\n{"text": ""}\n{"id": 3}', SAMPLES),
    "jsonl with columns of several types": (
        "a.jsonl",
        LINES + '\n{"text": "x", "id": 3}\n{"text": "y", "id": [3]}',
        SAMPLES,
    ),
    "one giant row": ("a.jsonl", json.dumps({"text": words(6000, " ")}), SAMPLES),
    "half a surrogate pair": ("a.jsonl", LINES + '\n{"text": "\\ud800 \\ud83d\\ude00"}', SAMPLES),
    "a number of 5000 digits in another column": (
        "a.jsonl",
        LINES + '\n{"text": "x", "id": ' + "9" * 5000 + "}",
        "digits",
    ),
    "lines in a .json": ("a.json", LINES, SAMPLES),
    "array in a line": ("a.json", json.dumps(ROWS), SAMPLES),
    "array over lines": ("a.json", json.dumps(ROWS, indent=1), SAMPLES),
    "array in a .jsonl": ("a.jsonl", json.dumps(ROWS, indent=1), SAMPLES),
    "csv": ("a.csv", "text,id\n" + "\n".join(f'"{row["text"]}, and\nmore",1' for row in ROWS), SAMPLES),
    "csv with a giant cell": ("a.csv", "id,text\n1," + words(200_000, " "), SAMPLES),
    "csv with short and long rows": (
        "a.csv",
        "text,id\n" + "\n".join(f"{row['text']},1,2" for row in ROWS) + "\nx",
        SAMPLES,
    ),
    "parquet": ("a.parquet", COLUMN, SAMPLES),
    "parquet, compressed": ("a.parquet.gz", gzip.compress(COLUMN), SAMPLES),
    "too little text": ("a.txt", TEXT[:300], "data.num_samples or data.length"),
    "empty": ("a.txt", "", "a.txt is empty"),
    "blanks": ("a.txt", " \n\t\n" * 20, "give more text"),
    "empty .md": ("a.md", "", "a.md is empty"),
    "empty .jsonl": ("a.jsonl", "", "a.jsonl is empty"),
    "blank .jsonl": ("a.jsonl", "\n\n", "a.jsonl is empty"),
    "empty array": ("a.json", "[]", "a.json is empty"),
    "empty .csv": ("a.csv", "", "a.csv is empty"),
    "header only": ("a.csv", "text,id\n", "a.csv is empty"),
    "no rows": ("a.parquet", parquet({"text": []}), "a.parquet is empty"),
    "empty .parquet": ("a.parquet", "", "a.parquet: "),
    "empty .gz": ("a.txt.gz", "", "a.txt.gz is empty"),
    "gz of nothing": ("a.txt.gz", gzip.compress(b""), "a.txt.gz is empty"),
    "UTF-16": ("a.txt", TEXT.encode("utf-16"), "is UTF-16, not UTF-8; convert it: iconv"),
    "UTF-16, other bytes first": ("a.txt", codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "is UTF-16, not UTF-8"),
    "UTF-16 without a mark": ("a.txt", TEXT.encode("utf-16-le"), "UTF-16, or no text at all"),
    "UTF-32": ("a.txt", TEXT.encode("utf-32"), "is UTF-16, not UTF-8"),
    "UTF-16 in .jsonl": ("a.jsonl", LINES.encode("utf-16"), "is UTF-16, not UTF-8"),
    "UTF-16 in .csv": ("a.csv", "text\nab".encode("utf-16"), "is UTF-16, not UTF-8"),
    "Latin-1": ("a.txt", (TEXT + "é").encode("latin-1"), "perhaps Latin-1 or Windows-1252; convert it: iconv"),
    "Latin-1 in .jsonl": ("a.jsonl", (LINES + '\n{"text": "é"}').encode("latin-1"), "perhaps Latin-1"),
    "Japanese": ("a.txt", "これは".encode("shift_jis") * 100, "is not UTF-8 (byte 0x82)"),
    "UTF-8 that is cut": ("a.txt", (TEXT + "é").encode()[:-1], "is not UTF-8"),
    "zeros": ("a.txt", b"\0" * 100_000, "no text"),
    "a picture": ("a.md", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "no text"),
    "an archive": ("a.txt", b"PK\x03\x04\x14\0\x06\0" + bytes(range(256)) * 20, "no text"),
    "a .gz that is none": ("a.txt.gz", TEXT, "a.txt.gz: Not a gzipped file"),
    "a .gz that is cut": ("a.txt.gz", gzip.compress(TEXT.encode())[:-40], "a.txt.gz: Compressed file ended"),
    "a .gz with another checksum": ("a.txt.gz", gzip.compress(TEXT.encode())[:-8] + b"\1" * 8, "CRC check failed"),
    "a .gz with garbage after it": ("a.txt.gz", gzip.compress(TEXT.encode()) + b"garbage", "Not a gzipped file"),
    "a .bz2 that is none": ("a.txt.bz2", TEXT, "a.txt.bz2: "),
    "a .xz that is none": ("a.txt.xz", TEXT, "a.txt.xz: "),
    "a .zst that is cut": ("a.txt.zst", b"\x28\xb5\x2f\xfd", "a.txt.zst"),
    "compressed what": ("a.gz", gzip.compress(TEXT.encode()), "a.gz is none of .txt, .md,"),
    "nested 100000 deep": ("a.jsonl", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "objects nested 100000 deep": ("a.jsonl", '{"text":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "a text nested 100000 deep": (
        "a.jsonl",
        LINES + '\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "nested too deeply",
    ),
    "half a line": ("a.jsonl", LINES[:-10], "is not JSON"),
    "half an array": ("a.json", json.dumps(ROWS)[:-10], "a.json: "),
    "no JSON": ("a.jsonl", TEXT, "a.jsonl: "),
    "a number": ("a.json", "3", "holds int; each row is an object"),
    "texts": ("a.json", json.dumps([row["text"] for row in ROWS]), "holds str; each row is an object"),
    "arrays": ("a.jsonl", '["a"]\n["b"]', "each row is an object"),
    "numbers": ("a.jsonl", '{"text": 3}', "field 'text' holds int, not text or messages"),
    "another column": ("a.jsonl", '{"body": "x", "id": 3}', "no field 'text'; choose data.field from body, id"),
    "objects of objects": ("a.json", '{"data": {"text": "x"}}', "no field 'text'; choose data.field from data"),
    "messages": ("a.jsonl", CHAT, "no field 'text'; choose data.field from messages"),
    "csv with another separator": ("a.csv", "text;id\nx;1", "no field 'text'; choose data.field from text;id"),
    "csv that ends in a quote": ("a.csv", 'text\n"x\n\n', "unexpected end of data"),
    "csv of NUL": ("a.csv", "text\n\0\n", "NUL"),
    "parquet that is cut": ("a.parquet", COLUMN[: len(COLUMN) // 2], "a.parquet: "),
    "parquet without its end": ("a.parquet", COLUMN[:-8], "a.parquet: "),
    "parquet of zeros": ("a.parquet", COLUMN[:4] + bytes(len(COLUMN) - 300) + COLUMN[-296:], "a.parquet: "),
    "parquet of numbers": ("a.parquet", parquet({"text": [1, 2]}), "field 'text' holds int"),
    "parquet of bytes": ("a.parquet", parquet({"text": [b"a", b"b"]}), "field 'text' holds bytes"),
    "text in a .parquet": ("a.parquet", TEXT, "a.parquet: "),
    "a document of Word": ("a.docx", TEXT, "a.docx is none of .txt, .md,"),
    "without a suffix": ("a", TEXT, "a is none of .txt, .md,"),
}


@pytest.fixture
def ends(tiny_run: Callable[..., Ended]) -> Callable[[Path | str, str], None]:
    """Plan a run on a path, which ends in samples or in one refusal, and writes nothing."""

    def check(path: Path | str, refusal: str) -> None:
        quoted = str(path).replace("\\", "\\\\").replace("'", "\\'")
        before = sorted(Path.cwd().rglob("*"))
        ended = tiny_run("data=files", f"data.paths=['{quoted}']", "plan=true")
        said = ended.out + ended.err
        assert sorted(Path.cwd().rglob("*")) == before
        assert "Traceback" not in said and "Error" not in said.replace("ErrorHandler", ""), said
        if refusal == SAMPLES:
            assert ended.status == 0 and "predicted" in ended.out, said
        else:
            assert ended.status == 2 and refusal in ended.err, said
            assert len(ended.err.splitlines()) <= 3, said  # one, or one for each part

    return check


@pytest.mark.parametrize("name", ODD)
def test_every_odd_file_ends_in_samples_or_in_one_refusal(
    name: str, ends: Callable[[Path | str, str], None], tmp_path: Path
) -> None:
    path, content, refusal = ODD[name]
    (tmp_path / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    ends(tmp_path / path, refusal)


def test_what_is_no_file_ends_in_samples_or_in_one_refusal(
    ends: Callable[[Path | str, str], None], tmp_path: Path
) -> None:
    (tmp_path / "there.txt").write_text(TEXT)
    (tmp_path / "folder" / "below").mkdir(parents=True)
    ends("folder", "folder is a folder without text; expected .txt")
    (tmp_path / "folder" / "below" / "a.md").write_text(TEXT)
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "link.txt").symlink_to("there.txt")
    (tmp_path / "nowhere.txt").symlink_to("missing.txt")
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    for path, refusal in {
        "folder": SAMPLES,
        "fol*": SAMPLES,
        "**/*.md": SAMPLES,
        "th?re.txt": SAMPLES,
        "link.txt": SAMPLES,
        "./folder/../there.txt": SAMPLES,
        "nowhere.txt": "nowhere.txt is a pipe, a device or a link to nothing",
        "circle.txt": "circle.txt",
        "fifo.txt": "fifo.txt is a pipe, a device or a link to nothing",
        "/dev/zero": "/dev/zero is a pipe, a device or a link to nothing",
        "missing.txt": "missing.txt is not there, or matches no file",
        "": "data.paths: ",
        "x" * 300 + ".txt": "data.paths: ",
        "there.txt/a.txt": "is not there",
        "~nobody-here/a.txt": "data.paths",
    }.items():
        ends(path, refusal)


@pytest.mark.parametrize("name", ["xz", "gz", "bz2", "parquet", "array over lines", "jsonl", "csv"])
def test_damaged_files_are_read_or_refused_by_name(name: str, tmp_path: Path) -> None:
    path, content, _ = ODD[name]
    content = content if isinstance(content, bytes) else content.encode()
    draw = random.Random(name)
    refused = 0
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        del damaged[draw.choice([len(damaged), draw.randrange(len(damaged))]) :]
        (tmp_path / path).write_bytes(damaged)
        source = Files(paths=str(tmp_path / path), num_samples=1, length=8, evaluation_samples=1, evaluation_length=8)
        try:
            source.check()
            source.samples(letter_tokenizer(), cache=tmp_path / "cache")
        except ValueError as error:
            refused += 1
            assert path in str(error), error
    assert refused > 10
