"""Text files are divided in their order; what is wrong with a file or a path is named."""

import socket

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from text_and_tokens import all_text, byte_tokenizer, library_logs, write_rows
from transformers import PreTrainedTokenizerFast

from lit_recon.data import hub
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
    monkeypatch.setattr(hub.joined, "__kwdefaults__", {"at_most": 1000})
    text = "".join(f"Line {number}\n\n" for number in range(2000))
    (tmp_path / "text.txt").write_text(text)
    documents = list(Files(paths=[str(tmp_path / "text.txt")]).documents("calibration"))
    assert len(documents) > 10 and max(map(len, documents)) < 1100
    assert text.startswith("".join(documents))


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
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "both.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    paths = ["missing.txt", "nothing*.txt", "folder", "table.csv", "both.txt", "empty.txt"]
    with pytest.raises(ValueError) as error:
        Files(paths=paths, evaluation_paths="both.txt", num_samples=0).check()
    message = str(error.value)
    for part in ("missing.txt is not there", "nothing*.txt is not there", "folder/*.txt", "empty.txt is empty"):
        assert part in message
    assert "table.csv is none of .txt, .jsonl, .parquet" in message
    assert "both.txt; name it in one of them" in message
    assert "data.num_samples=0" in message


def test_no_paths_at_all_is_refused():
    with pytest.raises(ValueError, match=r"data.paths: no file is named"):
        Files(paths=[]).check()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("latin1.txt", "caf\xe9".encode("latin-1"), "utf-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "JSON parse error"),
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


def test_files_give_samples_without_a_copy_in_the_cache_of_datasets(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "text.txt").write_text("".join(f"Paragraph {number}.\n\n" for number in range(500)))
    source = Files(paths=[str(tmp_path / "text.txt")], num_samples=4, length=32, evaluation_length=32)
    samples = source.samples(tokenizer, seed=0, cache=tmp_path / "cache")
    assert samples.calibration_ST.shape == (4, 32)
    assert samples.description == "text.txt"
    assert not list((tmp_path / "datasets").rglob("*.arrow"))


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
