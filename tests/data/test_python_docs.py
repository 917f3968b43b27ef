"""Parts of Python's documentation share no text."""

import sys

import pytest
from text_and_tokens import all_text, byte_tokenizer, texts
from transformers import PreTrainedTokenizerFast

from lit_recon.data.packing import pack
from lit_recon.data.python_docs import PythonDocs, divide


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


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
