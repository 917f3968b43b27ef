"""Sources of text: parts share no text, packing is exact, the cache is trusted only when intact, mistakes are named."""

import json
import logging
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from lit_recon.data import hub, packing
from lit_recon.data.files import Files
from lit_recon.data.hub import Hub
from lit_recon.data.packing import PADDING, draw, pack
from lit_recon.data.python_docs import PythonDocs, divide
from lit_recon.data.source import Part, TextSource

PARTS: tuple[Part, ...] = ("calibration", "held_out", "evaluation")
EOS, BOS = 256, 257  # after the 256 bytes
CONF = Path(__file__).parents[2] / "conf"


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


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, one token per letter; with `opens` it opens each text with `z`."""

    def __init__(self, letters: str = "abcdefghijklmnopqrstuvwxyz", *, opens: bool = False) -> None:
        self.letters, self.opens = letters, opens
        super().__init__(bos_token=letters[-1])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [len(self.letters) - 1] * self.opens + token_ids_0

    vocab_size = property(lambda self: len(self.letters))

    def get_vocab(self) -> dict[str, int]:
        return {letter: index for index, letter in enumerate(self.letters)}

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.letters.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.letters[index]


class Words(TextSource):
    """A user's source: 60 documents of ten bytes for each part."""

    def documents(self, part: Part) -> Iterable[str]:
        return [f"{part[:7]}{number:03}"[:10] for number in range(60)]


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


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def library_logs(caplog) -> Iterator[pytest.LogCaptureFixture]:
    """What libraries log; theirs do not reach the root logger, and write to the stderr of the time of their import."""
    loggers = [logging.getLogger(name) for name in ("transformers", "datasets", "huggingface_hub")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


# ---- packing


def test_pieces_are_cut_from_documents_joined_by_the_end_of_text_token(tokenizer, tmp_path):
    pieces = pack(["abcd", "ef", "gh"], tokenizer, length=3, cache=tmp_path)
    # abcd|ef|gh: the last piece is not full and is dropped
    assert pieces.tolist() == [ascii_ids("abc"), [*ascii_ids("d"), EOS, *ascii_ids("e")], [*ascii_ids("f"), EOS, 103]]
    assert pieces.dtype == torch.int32


def test_a_tokenizer_without_end_of_text_token_gives_documents_without_anything_between(tmp_path):
    pieces = pack(["abcd", "ef"], byte_tokenizer(eos=False), length=3, cache=tmp_path)
    assert pieces.tolist() == [ascii_ids("abc"), ascii_ids("def")]


def test_a_tokenizer_that_opens_texts_with_bos_opens_every_piece_with_it_and_no_document(tmp_path):
    pieces = pack(["abcd", "ef"], byte_tokenizer(bos=True), length=3, cache=tmp_path)
    # abcd|ef in twos
    assert pieces.tolist() == [[BOS, *ascii_ids("ab")], [BOS, *ascii_ids("cd")], [BOS, EOS, *ascii_ids("e")]]


def test_a_slow_tokenizer_packs_too_and_its_vocabulary_is_part_of_the_key(tmp_path):
    assert pack(["abc"], SlowTokenizer(), length=3, cache=tmp_path).tolist() == [[0, 1, 2]]
    assert pack(["abc"], SlowTokenizer("cbaz"), length=3, cache=tmp_path).tolist() == [[2, 1, 0]]
    assert pack(["abc"], SlowTokenizer(opens=True), length=3, cache=tmp_path).tolist() == [[25, 0, 1]]


def test_documents_longer_than_the_models_context_are_neither_truncated_nor_warned_about(tmp_path, library_logs):
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 8
    tokenizer.backend_tokenizer.enable_truncation(8)  # many tokenizer.json files say so
    assert len(pack(["x" * 4000], tokenizer, length=100, cache=tmp_path)) == 40
    assert not library_logs.records


def test_documents_in_many_batches_give_the_same_pieces_as_in_one(tokenizer, tmp_path, monkeypatch):
    documents = [chr(97 + number) * (number + 1) for number in range(20)]
    whole = pack(documents, tokenizer, length=7, cache=tmp_path / "whole")
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 12)
    assert torch.equal(pack(documents, tokenizer, length=7, cache=tmp_path / "batches"), whole)


# ---- packing by documents


def by_document(documents: list[str], tokenizer: PreTrainedTokenizerFast, *, length: int, cache: Path) -> list:
    pieces = pack(documents, tokenizer, length=length, cache=cache, packing="documents")
    assert pieces.dtype == torch.int32 and pieces.shape[1] == length
    return pieces.tolist()


def test_padding_is_the_index_that_torch_ignores():
    assert torch.nn.CrossEntropyLoss().ignore_index == PADDING


def test_by_documents_each_piece_is_of_one_document_and_the_last_ends_with_end_of_text_and_padding(tokenizer, tmp_path):
    # abc|d|___ and ef|
    assert by_document(["abcd", "ef"], tokenizer, length=3, cache=tmp_path) == [
        ascii_ids("abc"),
        [*ascii_ids("d"), EOS, PADDING],
        [*ascii_ids("ef"), EOS],
    ]


def test_by_documents_bos_opens_every_piece_and_counts_in_its_length(tmp_path):
    assert by_document(["abcdef", "g"], byte_tokenizer(bos=True), length=5, cache=tmp_path) == [
        [BOS, *ascii_ids("abcd")],
        [BOS, *ascii_ids("ef"), EOS, PADDING],
        [BOS, *ascii_ids("g"), EOS, PADDING, PADDING],
    ]


def test_by_documents_a_document_that_fills_its_pieces_has_no_room_for_end_of_text(tokenizer, tmp_path):
    assert by_document(["abcdef"], tokenizer, length=3, cache=tmp_path) == [ascii_ids("abc"), ascii_ids("def")]


def test_by_documents_a_rest_of_one_token_is_dropped_whether_or_not_bos_is_before_it(tmp_path):
    without_eos = byte_tokenizer(eos=False)
    assert by_document(["abcd", "e", "fg"], without_eos, length=3, cache=tmp_path) == [
        ascii_ids("abc"),
        [*ascii_ids("fg"), PADDING],
    ]
    opened = byte_tokenizer(eos=False, bos=True)
    assert by_document(["abcd", "e", "fg"], opened, length=4, cache=tmp_path) == [
        [BOS, *ascii_ids("abc")],
        [BOS, *ascii_ids("fg"), PADDING],
    ]


def test_by_documents_full_pieces_of_one_token_after_bos_are_kept(tmp_path):
    opened = byte_tokenizer(eos=False, bos=True)
    assert by_document(["ab"], opened, length=2, cache=tmp_path) == [[BOS, 97], [BOS, 98]]


def test_documents_too_short_for_a_piece_give_none_in_either_way(tokenizer, tmp_path):
    assert by_document([], tokenizer, length=4, cache=tmp_path) == []
    assert by_document(["a"], byte_tokenizer(eos=False), length=4, cache=tmp_path) == []
    assert pack([], tokenizer, length=4, cache=tmp_path).shape == (0, 4)
    assert pack(["a"], tokenizer, length=4, cache=tmp_path).shape == (0, 4)


def test_tokenizing_leaves_the_environment_as_it_was(tokenizer, tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    pack(["abc"], tokenizer, length=2, cache=tmp_path)
    assert "TOKENIZERS_PARALLELISM" not in packing.os.environ


def test_the_seed_alone_decides_which_pieces_are_drawn_and_none_is_drawn_twice():
    pieces = torch.arange(100, dtype=torch.int32).view(50, 2)
    torch.manual_seed(1)
    first = draw(pieces, 20, seed=3)
    torch.manual_seed(2)
    assert torch.equal(draw(pieces, 20, seed=3), first)
    assert not torch.equal(draw(pieces, 20, seed=4), first)
    assert len(set(first[:, 0].tolist())) == 20
    assert first.dtype == torch.int64


# ---- the cache of tokens


def cached_files(cache: Path) -> list[Path]:
    return sorted((cache / "tokens").iterdir())


def test_what_was_tokenized_before_is_not_tokenized_again(tokenizer, tmp_path, monkeypatch):
    first = pack(["some text"], tokenizer, length=4, cache=tmp_path)
    monkeypatch.setattr(packing, "_tokens", lambda *_: pytest.fail("tokenized again"))
    assert torch.equal(pack(["some text"], byte_tokenizer(), length=4, cache=tmp_path), first)


@pytest.mark.parametrize(
    ("documents", "tokenizer_settings", "length"),
    [
        (["some texT"], {}, 4),
        (["some", " text"], {}, 4),
        (["some text"], {"eos": False}, 4),
        (["some text"], {"bos": True}, 4),
        (["some text"], {}, 5),
    ],
)
def test_other_text_tokenizer_or_length_is_another_entry_of_the_cache(
    tokenizer, tmp_path, documents, tokenizer_settings, length
):
    pack(["some text"], tokenizer, length=4, cache=tmp_path)
    pack(documents, byte_tokenizer(**tokenizer_settings), length=length, cache=tmp_path)
    assert len(cached_files(tmp_path)) == 2


def test_the_way_of_packing_is_part_of_the_key_and_padded_pieces_come_back_from_the_cache(
    tokenizer, tmp_path, monkeypatch
):
    fixed = pack(["abcd", "ef"], tokenizer, length=3, cache=tmp_path)
    first = by_document(["abcd", "ef"], tokenizer, length=3, cache=tmp_path)
    assert len(cached_files(tmp_path)) == 2 and first != fixed.tolist()
    monkeypatch.setattr(packing, "_tokens", lambda *_: pytest.fail("tokenized again"))
    assert by_document(["abcd", "ef"], tokenizer, length=3, cache=tmp_path) == first
    assert torch.equal(pack(["abcd", "ef"], tokenizer, length=3, cache=tmp_path), fixed)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def put_another_entry_in_its_place(path: Path) -> None:
    pack(["OTHER TEXT OF THE SAME KIND"], byte_tokenizer(), length=4, cache=path.parent / "other")
    shutil.copy(cached_files(path.parent / "other")[0], path)
    shutil.rmtree(path.parent / "other")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, put_another_entry_in_its_place])
def test_a_damaged_cache_entry_is_noticed_and_made_again(tokenizer, tmp_path, caplog, damage):
    first = pack(["some text"], tokenizer, length=4, cache=tmp_path).clone()
    (path,) = cached_files(tmp_path)
    intact = path.read_bytes()
    damage(path)
    assert torch.equal(pack(["some text"], tokenizer, length=4, cache=tmp_path), first)
    assert "made again" in caplog.text
    assert cached_files(tmp_path) == [path] and path.read_bytes() == intact


def test_a_cache_that_cannot_be_written_costs_a_warning_not_the_run(tokenizer, tmp_path, caplog):
    (tmp_path / "tokens").write_text("a file where the folder should be")
    assert len(pack(["some text"], tokenizer, length=4, cache=tmp_path)) == 2
    assert "cannot be cached" in caplog.text


# ---- what all sources share


def test_samples_have_the_asked_shapes_and_come_from_their_own_part(tokenizer, tmp_path):
    source = Words(num_samples=5, length=10, num_held_out=3, evaluation_samples=4, evaluation_length=21)
    samples = source.samples(tokenizer, seed=0, cache=tmp_path)
    assert samples.calibration_ST.shape == (5, 10)
    assert samples.held_out_ST.shape == (3, 10)
    assert samples.evaluation_ST.shape == (4, 21)
    assert {tensor.dtype for tensor in vars(samples).values() if isinstance(tensor, torch.Tensor)} == {torch.int64}
    assert samples.description == "Words"
    assert all(set(text) <= set("calibrt|0123456789") for text in texts(samples.calibration_ST))
    assert all(set(text) <= set("held_ou|0123456789") for text in texts(samples.held_out_ST))
    # in order: documents of ten bytes and the token between them
    assert texts(samples.evaluation_ST)[:2] == ["evaluat000|evaluat001", "|evaluat002|evaluat00"]


def test_the_seed_changes_calibration_and_held_out_samples_and_not_the_evaluation(tokenizer, tmp_path):
    source = Words(num_samples=5, length=10, num_held_out=3, evaluation_samples=4, evaluation_length=20)
    first, again, other = (source.samples(tokenizer, seed=seed, cache=tmp_path) for seed in (0, 0, 1))
    assert torch.equal(first.calibration_ST, again.calibration_ST) and torch.equal(first.held_out_ST, again.held_out_ST)
    assert not torch.equal(first.calibration_ST, other.calibration_ST)
    assert not torch.equal(first.held_out_ST, other.held_out_ST)
    assert torch.equal(first.evaluation_ST, other.evaluation_ST)


def test_evaluation_samples_none_takes_all_there_are(tokenizer, tmp_path):
    source = Words(num_samples=5, length=10, evaluation_samples=None, evaluation_length=20)
    source.check()
    assert len(source.samples(tokenizer, seed=0, cache=tmp_path).evaluation_ST) == (60 * 11 - 1) // 20


def test_a_document_that_two_parts_name_stays_with_the_evaluation(tokenizer, tmp_path, caplog):
    class Careless(TextSource):
        def documents(self, part: Part) -> Iterable[str]:
            return {"evaluation": ["EEEE", "SHARED"], "held_out": ["HHHH"], "calibration": ["SHARED", "CCCC"]}[part]

    source = Careless(num_samples=2, length=2, num_held_out=1, evaluation_samples=5, evaluation_length=2)
    samples = source.samples(tokenizer, seed=0, cache=tmp_path)
    assert sorted(texts(samples.calibration_ST)) == ["CC", "CC"]
    assert texts(samples.evaluation_ST) == ["EE", "EE", "|S", "HA", "RE"]
    assert "1 documents of the calibration part are left out" in caplog.text


def test_no_more_is_read_than_leaves_the_seed_a_choice(tokenizer, tmp_path):
    read = dict.fromkeys(PARTS, 0)

    class Endless(TextSource):
        def documents(self, part: Part) -> Iterator[str]:
            while True:
                read[part] += 1
                yield f"{part} {read[part]} ".ljust(1 << 14, "x")

    source = Endless(num_samples=64, length=1024, num_held_out=1, evaluation_samples=1, evaluation_length=1024)
    source.samples(tokenizer, seed=0, cache=tmp_path)
    # 32 characters a token: 2 MiB for 64 x 1024 tokens, and a mebibyte where that is more
    assert read == {"calibration": 128, "held_out": 64, "evaluation": 64}


def test_too_few_tokens_names_both_numbers_and_what_to_lower_for_every_part(tokenizer, tmp_path):
    source = Words(num_samples=66, length=10, num_held_out=70, evaluation_samples=4, evaluation_length=200)
    with pytest.raises(ValueError) as error:
        source.samples(tokenizer, seed=0, cache=tmp_path)
    calibration, held_out, evaluation = str(error.value).splitlines()
    assert "65 samples of 10 tokens (650 tokens)" in calibration  # 60 documents of ten bytes, 59 tokens between them
    assert "66 (660 tokens)" in calibration and "data.num_samples or data.length" in calibration
    assert "70 (700 tokens)" in held_out and "data.num_held_out or data.length" in held_out
    assert "3 samples of 200 tokens (600 tokens)" in evaluation and "data.evaluation_samples" in evaluation


def test_by_documents_samples_are_single_documents_and_the_evaluation_stays_as_it_is(tokenizer, tmp_path):
    source = Words(num_samples=60, length=13, packing="documents", num_held_out=60, evaluation_length=21)
    samples = source.samples(tokenizer, seed=0, cache=tmp_path)
    # ten bytes, end-of-text, two of padding; all 60 are drawn, each once
    for drawn, name in ((samples.calibration_ST, "calibra"), (samples.held_out_ST, "held_ou")):
        assert drawn.dtype == torch.int64 and (drawn[:, 11:] == PADDING).all()
        assert sorted(texts(drawn[:, :11])) == [f"{name}{number:03}|" for number in range(60)]
    assert samples.evaluation_ST.shape == (16, 21)
    assert texts(samples.evaluation_ST)[:2] == ["evaluat000|evaluat001", "|evaluat002|evaluat00"]


def test_too_few_samples_by_documents_are_reported_with_their_tokens_without_padding(tokenizer, tmp_path):
    settings = {"num_held_out": 1, "evaluation_samples": 4, "evaluation_length": 200}
    source = Words(num_samples=61, length=13, packing="documents", **settings)
    with pytest.raises(ValueError) as error:
        source.samples(tokenizer, seed=0, cache=tmp_path)
    calibration, evaluation = str(error.value).splitlines()
    # 60 documents of ten bytes and end-of-text
    assert "60 samples of at most 13 tokens (660 tokens), asked for are 61 (at most 793 tokens)" in calibration
    assert "3 samples of 200 tokens (600 tokens), asked for are 4 (800 tokens)" in evaluation


def test_an_unknown_way_of_packing_is_one_message_with_the_choices():
    with pytest.raises(ValueError) as error:
        Words(packing="document").check()
    assert str(error.value) == "data.packing='document': choose one of fixed, documents"
    Words(packing="documents").check()


def test_all_wrong_settings_are_in_one_message():
    source = Words(num_samples=0, length=1, batch_size=2.5, num_held_out=True, evaluation_samples=-1)
    with pytest.raises(ValueError) as error:
        source.check()
    for part in ("num_samples=0", "length=1", "batch_size=2.5", "num_held_out=True", "evaluation_samples=-1"):
        assert f"data.{part}:" in str(error.value)
    assert "evaluation_length" not in str(error.value)


def test_the_source_in_the_docstring_works_as_it_stands(tokenizer, tmp_path, monkeypatch):
    lines = (TextSource.__doc__ or "").splitlines()
    first = next(number for number, line in enumerate(lines) if line.strip().startswith("from pathlib"))
    last = next(number for number, line in enumerate(lines) if ".glob(" in line)
    assert last - first < 15
    (tmp_path / "mine.py").write_text("\n".join(line.removeprefix(" " * 8) for line in lines[first : last + 1]))
    for number, folder in enumerate(("train", "validation", "test")):
        (tmp_path / "poems" / folder).mkdir(parents=True)
        (tmp_path / "poems" / folder / "one.txt").write_text("abc"[number] * 1000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    source = instantiate({"_target_": "mine.Poems", "num_samples": 2, "length": 10, "evaluation_length": 10})
    source.check()
    samples = source.samples(tokenizer, seed=0, cache=tmp_path)
    assert (set(texts(samples.calibration_ST)), set(texts(samples.evaluation_ST))) == ({"a" * 10}, {"c" * 10})


# ---- the Python documentation


def test_parts_of_the_python_docs_have_no_200_characters_in_common():
    passages = {
        part: {text[start : start + 200] for text in documents for start in range(len(text) - 199)}
        for part, documents in all_text(PythonDocs()).items()
    }
    assert all(len(found) > 10_000 for found in passages.values())
    assert passages["calibration"].isdisjoint(passages["evaluation"])
    assert passages["calibration"].isdisjoint(passages["held_out"])
    assert passages["held_out"].isdisjoint(passages["evaluation"])


def test_python_docs_are_split_six_to_one_to_three():
    sizes = {part: sum(map(len, documents)) for part, documents in all_text(PythonDocs()).items()}
    assert sum(sizes.values()) > 300_000
    shares = {part: size / sum(sizes.values()) for part, size in sizes.items()}
    assert shares == pytest.approx({"calibration": 0.6, "held_out": 0.1, "evaluation": 0.3}, abs=0.03)


def test_whatever_the_seed_python_docs_samples_come_from_the_same_part(tokenizer, tmp_path):
    source = PythonDocs(num_samples=8, length=64)
    pieces = set(texts(pack(list(source.documents("calibration")), tokenizer, length=64, cache=tmp_path)))
    for seed in range(4):
        assert set(texts(source.samples(tokenizer, seed=seed, cache=tmp_path).calibration_ST)) <= pieces


def test_topics_that_share_text_go_together_and_excerpts_are_left_out():
    def line(letter: str) -> str:
        return letter * 70 + "\n"

    topics = {
        "whole": "title\n" + line("a") + line("b") + line("c") + line("d"),
        "excerpt": "another title\n" + line("b") + line("c"),
        "half": line("d") + line("e") + line("h"),
        "chained": line("e") + line("f"),
        "alone": line("g") * 3,
        "short": "as short as this line\n",
        "same short": "as short as this line\n",
    }
    parts = divide(topics)
    assert sorted(name for names in parts.values() for name in names) == sorted(topics.keys() - {"excerpt"})
    (together,) = [names for names in parts.values() if "whole" in names]
    assert {"whole", "half", "chained"} <= set(together)
    assert "alone" not in together


def test_a_python_without_help_texts_is_refused_with_the_alternative(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match=r"data=files data.paths"):
        PythonDocs().check()


# ---- files


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
    tmp_path, library_logs, name, content, reason
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        Files(paths=[str(tmp_path / name)]).check()
    assert name in str(error.value) and reason in str(error.value)
    assert not library_logs.records


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


# ---- the Hub


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data set in the Hub's layout: 100 rows to train, 5 to test."""
    write_rows(tmp_path / "set" / "train.jsonl", [{"text": f"train {number}", "id": number} for number in range(100)])
    write_rows(tmp_path / "set" / "test.jsonl", [{"text": f"test {number}", "id": number} for number in range(5)])
    return tmp_path / "set"


def test_one_split_is_dealt_out_without_a_common_document(folder):
    source = Hub(name=str(folder))
    source.check()
    parts = all_text(source)
    assert [len(parts[part]) for part in PARTS] == [70, 10, 20]
    assert len({text for documents in parts.values() for text in documents}) == 100


def test_evaluation_may_have_a_split_of_its_own(folder):
    source = Hub(name=str(folder), evaluation={"split": "test"})
    source.check()
    parts = all_text(source)
    assert parts["evaluation"] == [f"test {number}" for number in range(5)]
    assert (len(parts["calibration"]), len(parts["held_out"])) == (90, 10)
    assert source.describe("calibration") == f"{folder} train" and source.describe("evaluation") == f"{folder} test"


def test_evaluation_may_be_another_data_set_with_another_field(folder, tmp_path):
    write_rows(tmp_path / "other" / "validation.jsonl", [{"body": "to evaluate"}])
    evaluation = {"name": str(tmp_path / "other"), "split": "validation", "field": "body"}
    assert list(Hub(name=str(folder), evaluation=evaluation).documents("evaluation")) == ["to evaluate"]


def test_blank_rows_are_no_documents(tmp_path):
    write_rows(tmp_path / "set" / "train.jsonl", [{"text": text} for text in ("a", "", " \n", None, "b", "c", "d")])
    assert all_text(Hub(name=str(tmp_path / "set"))) == {
        "calibration": ["a", "b", "c"],
        "held_out": [],
        "evaluation": ["d"],
    }


def test_data_files_choose_among_the_files(folder):
    source = Hub(name=str(folder), data_files=["test.jsonl"])
    assert sum(map(len, all_text(source).values())) == 5


def test_lines_of_one_text_are_joined_as_papers_join_wikitext(tmp_path):
    rows = ["", " = Title = \n", "", " A paragraph . \n"]
    write_rows(tmp_path / "wiki" / "test.jsonl", [{"text": row} for row in rows])
    source = Hub(name=str(tmp_path / "wiki"), split="test", separator="\n\n", evaluation={"split": "test"})
    assert list(source.documents("evaluation")) == ["\n\n".join(rows)]


def test_joined_lines_are_dealt_out_in_blocks_that_keep_their_context(tmp_path):
    rows = [f"{number:05} ".ljust(100, "x") for number in range(4000)]
    write_rows(tmp_path / "wiki" / "train.jsonl", [{"text": row} for row in rows])
    parts = all_text(Hub(name=str(tmp_path / "wiki"), separator="\n"))
    assert sorted("\n".join(text for documents in parts.values() for text in documents).split("\n")) == rows
    first = parts["evaluation"][0].split("\n")
    assert len(first) > 100 and first == rows[int(first[0][:5]) :][: len(first)]
    assert len(parts["held_out"]) == 2  # of 20 blocks


def test_streaming_reads_no_further_than_the_samples_need(tokenizer, tmp_path, monkeypatch):
    reads = []

    def endless(*_: object, **arguments: object) -> Iterator[dict]:
        assert arguments["streaming"] is True
        reads.append(0)
        while True:
            reads[-1] += 1
            yield {"text": f"{reads[-1]} ".ljust(1 << 14, "x")}

    monkeypatch.setattr(hub, "load_dataset", endless)
    (tmp_path / "set").mkdir()
    source = Hub(name=str(tmp_path / "set"), num_samples=2, length=64, evaluation_samples=2)
    for part in PARTS:
        vars(source).pop("_dataset", None)
        source._read(part, set())
    # a mebibyte is 64 documents of 16 KiB; one in ten is held out, two are for evaluation
    assert reads[0] < 64 / 0.7 + 10 and 630 < reads[1] < 650 and reads[2] < 330


def test_without_streaming_a_split_is_kept_for_the_next_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    assert len(list(Hub(name=str(folder)).documents("calibration"))) == 70
    assert not list((tmp_path / "datasets").rglob("*.arrow"))
    assert len(list(Hub(name=str(folder), streaming=False).documents("calibration"))) == 70
    assert list((tmp_path / "datasets").rglob("*.arrow"))


def closed_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def test_an_unreachable_hub_is_one_message_with_the_alternative_and_without_a_wait(monkeypatch, library_logs):
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: pytest.fail("went on to half a minute of attempts"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(ValueError) as error:
        Hub(name="owner/some_set").check()
    assert "data set owner/some_set train: the Hub cannot be reached" in str(error.value)
    assert "data=files data.paths=[...]" in str(error.value)
    assert not library_logs.records


@pytest.mark.parametrize("streaming", [True, False])
def test_offline_mode_is_the_same_message(monkeypatch, streaming):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot be reached .* data=files data.paths=\[\.\.\.\]"):
        Hub(name="owner/some_set", streaming=streaming).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "validation"}, r"validation.*train.*test"),
        ({"config": "nosuch"}, r"nosuch.*default"),
        ({"field": "body"}, r"no field 'body'; choose data.field from id, text"),
        ({"data_files": "nosuch.jsonl"}, r"nosuch.jsonl"),
        ({"evaluation": {"split": "nosuch"}}, r"nosuch.*train.*test"),
        ({"evaluation": {"splt": "test"}}, r"data.evaluation has splt; it may have name, config, split, field"),
        ({"evaluation": {"num_samples": 3}}, r"data.evaluation has num_samples"),
        ({"name": "not a name"}, r"data.name='not a name' is neither a folder here nor a Hub id"),
    ],
)
def test_what_a_data_set_lacks_is_named_with_what_it_has(folder, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        Hub(**{"name": str(folder), **settings}).check()
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"nothing train: .*data files"):
        Hub(name=str(tmp_path / "nothing")).check()


# ---- the configuration


@pytest.mark.parametrize("member", sorted(path.stem for path in (CONF / "data").glob("*.yaml")))
def test_every_data_yaml_makes_a_source(member):
    missing = {
        "files": ["data.paths=[a.txt]"],
        "hub": ["data.name=owner/set"],
        "custom": [f"data._target_={Words.__module__}.Words"],
    }
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(overrides=[f"+data={member}", *missing.get(member, [])])
    source = instantiate(cfg.data, _convert_="all")
    assert isinstance(source, TextSource)
    assert source._problems() == [] or member == "files"  # there is no a.txt


@pytest.mark.parametrize("member", ["c4", "wikitext2", "minipile"])
def test_data_sets_of_the_paper_are_evaluated_on_the_whole_wikitext_test_set(member):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        source = instantiate(compose(overrides=[f"+data={member}"]).data, _convert_="all")
    assert (source.num_samples, source.length, source.evaluation_length) == (128, 2048, 2048)
    assert source.evaluation_samples is None
    assert source.describe("evaluation") == "Salesforce/wikitext wikitext-2-raw-v1 test"
    assert source._evaluation.separator == "\n\n" and source._evaluation.data_files is None
