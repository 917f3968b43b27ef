"""Text files are divided in their order; what is wrong with a file or a path is named."""

import gzip
import socket

import pyarrow
import pyarrow.parquet
import pytest
from text_and_tokens import all_text, byte_tokenizer, library_logs, write_rows
from transformers import PreTrainedTokenizerFast

from lit_recon.data import documents
from lit_recon.data.files import Files


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def test_rows_are_cut_in_their_order_seventy_ten_twenty(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {number}"} for number in range(10)])
    parts = all_text(Files(paths=[str(path)]))
    assert parts["calibration"] == [f"row {number}" for number in range(7)]
    assert parts["held_out"] == ["row 7"]
    assert parts["evaluation"] == ["row 8", "row 9"]


def test_the_cut_counts_characters_not_rows(tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl",
        [{"text": letter * size} for letter, size in {"a": 70, "b": 10, "c": 10, "d": 10}.items()],
    )
    parts = all_text(Files(paths=str(path)))
    assert parts == {"calibration": ["a" * 70], "held_out": ["b" * 10], "evaluation": ["c" * 10, "d" * 10]}


def test_files_for_evaluation_leave_nine_tenths_and_one_tenth(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {number}"} for number in range(10)])
    other = write_rows(tmp_path / "other.jsonl", [{"text": "evaluate this"}])
    source = Files(paths=[str(path)], evaluation_paths=[str(other)])
    source.check()
    parts = all_text(source)
    assert parts["calibration"] == [f"row {number}" for number in range(9)]
    assert parts["held_out"] == ["row 9"]
    assert parts["evaluation"] == ["evaluate this"]
    assert source.describe("calibration") == "rows.jsonl" and source.describe("evaluation") == "other.jsonl"


def test_txt_jsonl_and_parquet_are_read_from_one_list_in_its_order(tmp_path):
    (tmp_path / "b [1].txt").write_text("first\n\nsecond\n")
    write_rows(tmp_path / "a.jsonl", [{"body": "third", "text": "no"}, {"body": None, "text": "no"}, {"body": " "}])
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["fourth", "fifth"]}), tmp_path / "c.parquet")
    write_rows(tmp_path / "evaluation.jsonl", [{"body": "x"}])
    paths = [str(tmp_path / name) for name in ("b [1].txt", "a.jsonl", "*.parquet")]
    source = Files(paths=paths, field="body", evaluation_paths=[str(tmp_path / "evaluation.jsonl")])
    source.check()
    parts = all_text(source)
    assert parts["calibration"] + parts["held_out"] == ["first\n\nsecond\n", "third", "fourth", "fifth"]
    assert parts["evaluation"] == ["x"]


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"Paragraph {number}, line one,\nand line two.\n\n" for number in range(40)),
        "".join(f" = Heading {number} = \n \n {number} {'long , ' * 50}\n \n" for number in range(40)),  # WikiText
        "".join(f" = Heading {number} = \n {number} {'long , ' * 50}\n" for number in range(40)),  # no blank line
        "".join(f"Line {number} of a list without any blank line, kept short\n" for number in range(400)),
    ],
)
def test_a_txt_file_is_cut_between_paragraphs_or_lines_and_nothing_is_lost(tmp_path, text):
    (tmp_path / "text.txt").write_text(text)
    parts = all_text(Files(paths=[str(tmp_path / "text.txt")]))
    assert [len(documents) for documents in parts.values()] == [1, 1, 1]
    assert "".join(document for documents in parts.values() for document in documents) == text
    sizes = [len(documents[0]) / len(text) for documents in parts.values()]
    assert sizes == pytest.approx([0.7, 0.1, 0.2], abs=0.1)


def test_a_paragraph_that_repeats_an_evaluation_paragraph_is_left_out_and_a_repeated_heading_is_not(tmp_path, caplog):
    repeated = "These words stand twice. " * 10
    filling = [f"{number} is a paragraph of its own, as long as the others. " * 5 for number in range(20)]
    paragraphs = ["Heading", repeated, *filling, "Heading", repeated]
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs) + "\n\n")
    parts = all_text(Files(paths=[str(tmp_path / "text.txt")]))
    assert parts["calibration"][0].startswith("Heading\n\n\n" + filling[0])
    assert repeated not in parts["calibration"][0]
    assert parts["evaluation"][0].endswith("Heading\n\n" + repeated + "\n\n")
    assert "1 paragraphs of the calibration part are left out" in caplog.text


def test_a_long_txt_file_becomes_documents_that_a_tokenizer_can_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(documents.joined, "__kwdefaults__", {"at_most": 1000})
    text = "".join(f"Line {number}\n\n" for number in range(2000))
    (tmp_path / "text.txt").write_text(text)
    found = list(Files(paths=[str(tmp_path / "text.txt")]).documents("calibration"))
    assert len(found) > 10 and max(map(len, found)) < 1100
    assert text.startswith("".join(found))


def test_a_missing_field_lists_the_columns_of_each_format(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"title": "x", "body": "y"}])
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "content": ["z"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError) as error:
        Files(paths=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")]).check()
    first, second = str(error.value).splitlines()
    assert "a.jsonl: no field 'text'; choose data.field from body, title" in first
    assert "b.parquet: no field 'text'; choose data.field from content, id" in second


def test_all_that_is_wrong_with_paths_is_in_one_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.docx").write_text("text")
    (tmp_path / "both.txt").write_text("text")
    (tmp_path / "also.txt").symlink_to("both.txt")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    paths = ["missing.txt", "nothing*.txt", "folder", "text.docx", "both.txt", "empty.txt", "empty.jsonl"]
    with pytest.raises(ValueError) as error:
        Files(paths=paths, evaluation_paths="also.txt", num_samples=0).check()
    message = str(error.value)
    for part in ("missing.txt is not there", "nothing*.txt is not there", "empty.txt is empty", "empty.jsonl is empty"):
        assert part in message
    readable = ".txt, .md, .json, .jsonl, .csv, .parquet, also with .gz, .bz2, .xz, .zst"
    assert f"folder is a folder without text; expected {readable}" in message
    assert f"text.docx is none of {readable}" in message
    assert "both.txt; name it in one of them" in message
    assert "data.num_samples=0" in message


def test_no_paths_at_all_is_refused():
    with pytest.raises(ValueError, match=r"data.paths: no file is named"):
        Files(paths=[]).check()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("latin 1.txt", "caf\xe9".encode("latin-1"), "not UTF-8 (byte 0xe9), perhaps Latin-1 or Windows-1252; convert"),
        ("utf16.md", "text".encode("utf-16"), "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 "),
        ("utf16.csv", "text".encode("utf-16-le"), "it holds NUL characters: UTF-16, or no text at all"),
        ("binary.txt", b"\x89PNG\0", "holds NUL bytes, so that it is no text"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON: Expecting value at column 9"),
        ("deep.jsonl", b"[" * 100_000, "nested too deeply"),
        ("strings.json", b'["a", "b"]', 'the array holds str; each row is an object such as {"text": "..."}'),
        ("cut.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-20], "ended before"),
        ("broken.parquet", b"PAR1", "Parquet"),
        ("numbers.jsonl", b'{"text": 3}\n', "field 'text' holds int, not text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason_and_nothing_else_is_logged(
    tmp_path, caplog, name, content, reason
):
    (tmp_path / name).write_bytes(content)
    with library_logs(caplog), pytest.raises(ValueError) as error:
        Files(paths=[str(tmp_path / name)]).check()
    assert name in str(error.value) and reason in str(error.value)
    assert not caplog.records


def test_files_give_samples(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"Paragraph {number}.\n\n" for number in range(500)))
    source = Files(paths=[str(tmp_path / "text.txt")], num_samples=4, length=32, evaluation_length=32)
    samples = source.samples(tokenizer, seed=0, cache=tmp_path / "cache")
    assert samples.calibration_ST.shape == (4, 32)
    assert samples.description == samples.evaluation_description == "text.txt"


def test_local_files_are_read_without_use_of_the_network(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (tmp_path / "a.txt").write_text("text")
    write_rows(tmp_path / "b.jsonl", [{"text": "text"}])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["text"]}), tmp_path / "c.parquet")
    source = Files(paths=[str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.parquet")])
    source.check()
    assert sum(map(len, all_text(source).values())) == 3


SENTENCES = "".join(f"This is sentence number {number} of a text without an end of a line. " for number in range(800))


@pytest.mark.parametrize("name", ["line.txt", "row.jsonl"])
@pytest.mark.parametrize("text", [SENTENCES, SENTENCES.replace(".", ","), "".join(map(str, range(12_000)))])
def test_a_text_of_one_line_or_one_row_is_divided_too_and_nothing_is_lost(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text) if path.suffix == ".txt" else write_rows(path, [{"text": text}])
    parts = all_text(Files(paths=str(path)))
    assert "".join(document for part in parts.values() for document in part).removesuffix("\n") == text
    sizes = [sum(map(len, part)) / len(text) for part in parts.values()]
    assert sizes == pytest.approx([0.7, 0.1, 0.2], abs=0.05)
    assert text is not SENTENCES or parts["calibration"][0].endswith("line. ")


def test_a_row_in_which_no_part_ends_stays_whole(tmp_path):
    rows = [f"{number} " + SENTENCES[:5000] for number in range(40)]
    path = write_rows(tmp_path / "rows.jsonl", [{"text": row} for row in rows])
    parts = all_text(Files(paths=str(path)))
    assert set(parts["calibration"][:-1]) < set(rows) and len(parts["calibration"]) >= 28


def test_a_folder_is_all_text_in_it_and_a_file_that_is_named_twice_counts_once(tmp_path):
    (tmp_path / "notes" / "more").mkdir(parents=True)
    (tmp_path / "notes" / "b.md").write_text("second\n")
    (tmp_path / "notes" / "a.TXT.gz").write_bytes(gzip.compress(b"first\n"))
    (tmp_path / "notes" / "more" / "c.txt").write_text("third\n")
    (tmp_path / "notes" / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "evaluation.txt").write_text("other\n")
    settings = {"evaluation_paths": str(tmp_path / "evaluation.txt")}
    source = Files(paths=[str(tmp_path / "notes"), str(tmp_path / "notes" / ".." / "notes" / "b.md")], **settings)
    source.check()
    parts = all_text(source)
    assert parts["calibration"] + parts["held_out"] == ["first\n", "second\n", "third\n"]
    assert source.describe("calibration") == "a.TXT.gz and 2 more"


@pytest.mark.parametrize("paths", [5, [5], {"a": 1}, None])
def test_paths_that_are_no_names_are_one_message(paths):
    with pytest.raises(ValueError, match=r"data.paths: .* names no file; give \[a.txt, ...\]"):
        Files(paths=paths).check()
