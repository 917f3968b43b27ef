"""Packing is exact, and the cache of tokens is trusted only when intact."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from text_and_tokens import BOS, EOS, ascii_ids, byte_tokenizer, library_logs
from tokenizers import processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from lit_recon.data import packing
from lit_recon.data.packing import PADDING, draw, find_opening, pack


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


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


# ---- fixed


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


def opened_by(*tokens: str, **names: str) -> PreTrainedTokenizerFast:
    """A tokenizer that opens each text with several tokens, as GLM's does."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    ids = list(zip(tokens, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True))
    template = processors.TemplateProcessing(single=f"{' '.join(tokens)} $A", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.bos_token = names.get("bos")
    return tokenizer


def test_the_opening_is_all_that_the_tokenizer_puts_before_a_text_declared_or_not(tmp_path):
    tokenizer = opened_by("[gMASK]", "<sop>")
    opening = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    assert find_opening(tokenizer) == opening and None not in opening
    assert pack(["abcd"], tokenizer, length=4, cache=tmp_path).tolist() == [[*opening, 97, 98], [*opening, 99, 100]]
    assert find_opening(opened_by("<s>")) == [258]
    assert find_opening(byte_tokenizer()) == []
    assert find_opening(SlowTokenizer(opens=True)) == [25] and find_opening(SlowTokenizer()) == []


def test_an_end_of_text_token_that_the_tokenizer_puts_after_a_text_opens_none():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    assert find_opening(tokenizer) == [BOS]


def test_bos_is_put_before_each_piece_or_left_out_as_asked(tmp_path):
    leaves_out, opens = byte_tokenizer(), byte_tokenizer(bos=True)
    assert find_opening(leaves_out, True) == find_opening(opens, True) == find_opening(opens) == [BOS]
    assert find_opening(leaves_out, False) == find_opening(opens, False) == []
    assert pack(["ab"], leaves_out, length=2, cache=tmp_path, bos=True).tolist() == [[BOS, 97], [BOS, 98]]
    assert pack(["ab"], opens, length=2, cache=tmp_path, bos=False).tolist() == [[97, 98]]
    with pytest.raises(ValueError, match="data.bos=true: the model's tokenizer names no BOS token"):
        find_opening(opened_by("<s>"), True)


def test_an_opening_that_stands_in_the_text_is_not_there_twice(tmp_path):
    pieces = pack(["<bos>ab", "cd"], byte_tokenizer(bos=True), length=6, cache=tmp_path)
    assert pieces.tolist() == [[BOS, 97, 98, EOS, 99, 100]]


def test_a_slow_tokenizer_packs_too_and_its_vocabulary_is_part_of_the_key(tmp_path):
    assert pack(["abc"], SlowTokenizer(), length=3, cache=tmp_path).tolist() == [[0, 1, 2]]
    assert pack(["abc"], SlowTokenizer("cbaz"), length=3, cache=tmp_path).tolist() == [[2, 1, 0]]
    assert pack(["abc"], SlowTokenizer(opens=True), length=3, cache=tmp_path).tolist() == [[25, 0, 1]]


def test_documents_longer_than_the_models_context_are_neither_truncated_nor_warned_about(tmp_path, caplog):
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 8
    tokenizer.backend_tokenizer.enable_truncation(8)  # many tokenizer.json files say so
    with library_logs(caplog):
        assert len(pack(["x" * 4000], tokenizer, length=100, cache=tmp_path)) == 40
    assert not caplog.records


def test_documents_in_many_batches_give_the_same_pieces_as_in_one(tokenizer, tmp_path, monkeypatch):
    documents = [chr(97 + number) * (number + 1) for number in range(20)]
    whole = pack(documents, tokenizer, length=7, cache=tmp_path / "whole")
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 12)
    assert torch.equal(pack(documents, tokenizer, length=7, cache=tmp_path / "batches"), whole)


# ---- documents


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


def test_the_cache_is_for_others_too_and_forgets_what_killed_processes_have_left(tokenizer, tmp_path):
    old, young = tmp_path / "tokens" / "old.partial", tmp_path / "tokens" / "young.partial"
    old.parent.mkdir()
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    before = os.umask(0o022)
    try:
        pack(["one two three four"], tokenizer, length=2, cache=tmp_path)
    finally:
        os.umask(before)
    (entry,) = tmp_path.rglob("*.safetensors")
    assert entry.stat().st_mode & 0o777 == 0o644
    assert young.exists() and not old.exists()
