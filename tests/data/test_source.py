"""What all sources of text share: samples of three parts without common text, settings that are checked."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from text_and_tokens import BOS, PARTS, byte_tokenizer, texts
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from lit_recon.data.packing import PADDING
from lit_recon.data.source import Part, TextSource

CONF = Path(__file__).parents[2] / "conf"


class Words(TextSource):
    """A user's source: 60 documents of ten bytes for each part."""

    def documents(self, part: Part) -> Iterable[str]:
        return [f"{part[:7]}{number:03}"[:10] for number in range(60)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


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


def test_samples_of_retraining_are_others_than_those_of_windows_which_stay_the_same(tokenizer, tmp_path):
    settings = {"num_samples": 5, "length": 10, "num_held_out": 3, "evaluation_samples": 4, "evaluation_length": 20}
    without = Words(**settings).samples(tokenizer, seed=3, cache=tmp_path)
    samples = Words(**settings, num_retraining=7).samples(tokenizer, seed=3, cache=tmp_path)
    assert without.retraining_ST is None and without.num_retraining_tokens == 0
    assert samples.retraining_ST.shape == (7, 10) and samples.num_retraining_tokens == 70
    assert torch.equal(samples.calibration_ST, without.calibration_ST)
    assert torch.equal(samples.held_out_ST, without.held_out_ST)
    windows, own = set(texts(samples.calibration_ST)), set(texts(samples.retraining_ST))
    assert len(windows) == 5 and len(own) == 7 and not windows & own
    assert all(set(text) <= set("calibrt|0123456789") for text in own)


@pytest.mark.parametrize("packing", ["fixed", "documents"])
def test_where_retraining_needs_more_text_than_windows_these_still_have_the_same_samples(
    tokenizer, tmp_path, monkeypatch, packing
):
    read = dict.fromkeys(PARTS, 0)

    class Counted(TextSource):
        def documents(self, part: Part) -> Iterable[str]:
            for number in range(400):
                read[part] += 1
                yield f"{part[:1]}{number:05}" * (2 + number % 3)

    monkeypatch.setattr("lit_recon.data.source.AT_LEAST_CHARACTERS", 0)
    settings = {"num_samples": 5, "length": 10, "num_held_out": 3, "evaluation_samples": 4, "packing": packing}
    without = Counted(**settings, evaluation_length=20).samples(tokenizer, seed=3, cache=tmp_path)
    few = read["calibration"]
    samples = Counted(**settings, evaluation_length=20, num_retraining=70).samples(tokenizer, seed=3, cache=tmp_path)
    assert 0 < few < read["calibration"] - few, "it is read once for windows, and more of it for retraining"
    assert torch.equal(samples.calibration_ST, without.calibration_ST)
    assert torch.equal(samples.held_out_ST, without.held_out_ST) and len(samples.retraining_ST) == 70
    windows, own = ({tuple(row) for row in rows.tolist()} for rows in (samples.calibration_ST, samples.retraining_ST))
    assert len(own) == 70 and not windows & own


def test_too_little_text_for_windows_and_retraining_is_refused_by_their_sum(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"asked for are 90 .*lower data\.num_samples, data\.num_retraining or"):
        Words(num_samples=5, num_retraining=85, length=10).samples(tokenizer, cache=tmp_path)
    with pytest.raises(ValueError, match=r"data\.num_retraining=-1: give a whole number, 0 or more"):
        Words(num_retraining=-1).check()


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


def test_samples_say_what_opens_them_and_there_must_be_room_for_it(tmp_path):
    settings = {"num_samples": 2, "num_held_out": 1, "evaluation_samples": 1, "evaluation_length": 4}
    opens = byte_tokenizer(bos=True)
    assert Words(length=4, **settings).samples(opens, cache=tmp_path).opening == "<bos>"
    assert Words(length=4, bos=False, **settings).samples(opens, cache=tmp_path).opening == "none"
    opened = Words(length=4, bos=True, **settings).samples(byte_tokenizer(), cache=tmp_path)
    assert opened.opening == "<bos>" and texts(opened.evaluation_ST) == [chr(BOS) + "eva"]
    opens.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> <bos> $A", special_tokens=[("<bos>", BOS)]
    )
    with pytest.raises(ValueError, match=r"data.length=2: .* 2 tokens \(<bos><bos>\); give 3 or more"):
        Words(length=2, **settings).samples(opens, cache=tmp_path)
    twice = Words(length=4, **settings).samples(opens, cache=tmp_path)
    assert (twice.opening_length, twice.num_given) == (2, 2) and (opened.opening_length, opened.num_given) == (1, 1)
    nothing = Words(length=4, bos=False, **settings).samples(opens, cache=tmp_path)
    assert (nothing.opening_length, nothing.num_given) == (0, 1)


@pytest.mark.parametrize("bos", ["yes", 1, None])
def test_bos_is_auto_true_or_false(bos):
    with pytest.raises(ValueError, match=r"data.bos=.*: choose one of auto, true, false"):
        Words(bos=bos).check()


def test_what_is_no_valid_unicode_costs_a_question_mark(tokenizer, tmp_path):
    class Halves(TextSource):
        def documents(self, part: Part) -> Iterable[str]:
            return [f"{part[0]}\ud800" * 4]

    source = Halves(num_samples=1, length=4, num_held_out=1, evaluation_samples=1, evaluation_length=4)
    assert texts(source.samples(tokenizer, cache=tmp_path).evaluation_ST) == ["e?e?"]


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
    monkeypatch.setitem(sys.modules, "mine", None)  # so that it is gone afterwards
    del sys.modules["mine"]
    source = instantiate({"_target_": "mine.Poems", "num_samples": 2, "length": 10, "evaluation_length": 10})
    source.check()
    samples = source.samples(tokenizer, seed=0, cache=tmp_path)
    assert (set(texts(samples.calibration_ST)), set(texts(samples.evaluation_ST))) == ({"a" * 10}, {"c" * 10})


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
