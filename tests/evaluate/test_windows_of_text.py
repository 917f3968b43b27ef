"""Windows of a text: as pruning papers cut it, as transformers' guide overlaps them, and as a run's samples are."""

import json
from pathlib import Path

import pytest
import torch
from conftest import letter_tokenizer, telling_tokenizer

from lit_recon.data.files import Files
from lit_recon.data.hub import Hub
from lit_recon.data.packing import PADDING
from lit_recon.evaluate.windows import TextWindows, cut


def text(size: int) -> torch.Tensor:
    """The tokens 10, 11, 12, ..."""
    return torch.arange(10, 10 + size)


def rows(windows: TextWindows) -> list[list[int]]:
    """Windows without what is behind the end of the text."""
    return [[token for token in row if token != PADDING] for row in windows.tokens_ST.tolist()]


def test_without_a_stride_windows_follow_each_other_and_a_rest_is_dropped() -> None:
    windows = cut(text(11), [], length=4)
    assert rows(windows) == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert windows.first_S == (1, 1) and windows.num_tokens == 6


def test_an_opening_is_in_every_window_and_is_not_predicted() -> None:
    windows = cut(text(6), [1, 2], length=5)
    assert rows(windows) == [[1, 2, 10, 11, 12], [1, 2, 13, 14, 15]]
    assert windows.first_S == (2, 2) and windows.num_tokens == 6


def test_in_papers_an_opening_is_before_the_text_alone() -> None:
    windows = cut(text(7), [1], length=4, opening_at="text")
    assert rows(windows) == [[1, 10, 11, 12], [13, 14, 15, 16]]
    assert windows.first_S == (1, 1)


@pytest.mark.parametrize(("size", "length", "stride"), [(11, 4, 2), (11, 4, 3), (11, 4, 4), (10, 4, 1), (3, 5, 2)])
def test_with_a_stride_windows_and_predicted_tokens_are_those_of_the_guide_of_transformers(
    size: int, length: int, stride: int
) -> None:
    tokens, expected, last = list(range(10, 10 + size)), [], 0
    for begin in range(0, size, stride):  # huggingface.co/docs/transformers/perplexity
        end = min(begin + length, size)
        expected.append((tokens[begin:end], max(1, (end - begin) - (end - last))))
        last = end
        if end == size:
            break
    windows = cut(text(size), [], length=length, stride=stride)
    assert list(zip(rows(windows), windows.first_S, strict=True)) == expected
    predicted = [row[first:] for row, first in zip(rows(windows), windows.first_S, strict=True)]
    if stride < length:
        assert sum(predicted, []) == tokens[1:], "each token but the first once"


def test_overlapping_windows_each_have_the_opening() -> None:
    windows = cut(text(5), [1], length=4, stride=2)
    assert rows(windows) == [[1, 10, 11, 12], [1, 12, 13, 14]]
    assert windows.first_S == (1, 2) and windows.num_tokens == 5


@pytest.mark.parametrize("stride", [0, -1, 4])
def test_a_stride_that_leaves_tokens_out_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.stride={stride}: expected a whole number from 1 to 3"):
        cut(text(9), [1], length=4, stride=stride)


def test_too_little_text_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="9 tokens, which is 2 windows of 4 tokens; asked for are 3"):
        cut(text(9), [], length=4, number=3)
    with pytest.raises(ValueError, match="0 windows"):
        cut(text(3), [], length=4)
    with pytest.raises(ValueError, match="opening_at='never': choose one of window, text"):
        cut(text(9), [], length=4, opening_at="never")  # type: ignore[arg-type]


@pytest.mark.parametrize("bos", ["auto", True, False])
def test_windows_are_the_evaluation_samples_of_a_run(tmp_path: Path, text_file: Path, bos: bool | str) -> None:
    tokenizer = letter_tokenizer() if bos == "auto" else telling_tokenizer()
    source = Files(
        paths=[str(text_file)], num_samples=2, length=16, evaluation_samples=5, evaluation_length=32, bos=bos
    )  # type: ignore[arg-type]
    samples = source.samples(tokenizer, cache=tmp_path)
    opening = [tokenizer.bos_token_id] if bos is True else []
    windows = cut(source.evaluation_stream(tokenizer, cache=tmp_path), opening, length=32, number=5)
    assert torch.equal(windows.tokens_ST, samples.evaluation_ST)
    assert set(windows.first_S) == {samples.num_given}


def test_rows_of_a_data_set_are_joined_by_blank_lines_as_papers_join_wikitext(tmp_path: Path) -> None:
    lines = ["", " = Title = \n", "", " first line \n", " second line \n", ""] * 20
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "set" / "train.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    source = Hub(name=str(tmp_path / "set"), separator="\n\n", streaming=False, evaluation={"split": "test"})
    assert list(source.documents("evaluation")) == ["\n\n".join(lines)]
