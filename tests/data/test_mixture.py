"""Mixtures: as many samples of each source as its weight says, shuffled, of parts that stay apart."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import model_of, telling_tokenizer
from text_and_tokens import byte_tokenizer, texts

from lit_recon import Mixture, PythonDocs, SelfGenerated, TextSource
from lit_recon.data.files import Files
from lit_recon.data.source import Part

SMALL = {"num_samples": 8, "length": 10, "num_held_out": 4, "evaluation_samples": 2, "evaluation_length": 20}


class Letter(TextSource):
    """Documents of one letter, capitals where they are for evaluation; `num_samples` and so on are its own."""

    def __init__(self, letter: str) -> None:
        super().__init__(num_samples=10**6, length=7)
        self.letter = letter

    def documents(self, part: Part) -> Iterable[str]:
        letter = self.letter.upper() if part == "evaluation" else self.letter
        return [letter * (9 if part == "held_out" else 10) + f"{part[0]}{number:03}" for number in range(60)]

    def describe(self, part: Part) -> str:
        return f"letter {self.letter}"


def mixture(weights: dict[str, float], **settings: int) -> Mixture:
    sources = {name: Letter(name[0]) for name in weights}
    return Mixture(sources=sources, weights=weights, evaluation=Letter("e"), **SMALL | settings)


@pytest.mark.parametrize(
    ("weights", "number", "counts"),
    [
        ({"a": 1, "b": 1}, 8, {"a": 4, "b": 4}),
        ({"a": 1, "b": 1}, 7, {"a": 4, "b": 3}),  # of two alike, the first
        ({"a": 0.3, "b": 0.7}, 10, {"a": 3, "b": 7}),
        ({"a": 1, "b": 1, "c": 1}, 8, {"a": 3, "b": 3, "c": 2}),
        ({"a": 1, "b": 6, "c": 3}, 4, {"a": 1, "b": 2, "c": 1}),  # 0.4, 2.4, 1.2: the larger remainder, then the first
        ({"a": 0, "b": 5}, 8, {"b": 8}),
        ({"a": 1, "b": 1000}, 8, {"b": 8}),
    ],
)
def test_samples_are_divided_by_weight_the_largest_remainders_rounded_up(
    weights: dict[str, float], number: int, counts: dict[str, int], tmp_path: Path
) -> None:
    source = mixture(weights, num_samples=number, num_held_out=number)
    samples = source.samples(byte_tokenizer(), cache=tmp_path)
    for tokens_ST in (samples.calibration_ST, samples.held_out_ST):
        letters = (Counter(text).most_common(1)[0][0] for text in texts(tokens_ST))
        assert Counter(letters) == counts
    said = " and ".join(f"{count} samples of letter {name}" for name, count in counts.items())
    assert samples.description == f"{said}; evaluation: letter e"
    assert all(set(text) & set("abc") == set() for text in texts(samples.evaluation_ST))
    assert samples.evaluation_description == "letter e" and samples.evaluation_split == "evaluation"


def test_samples_of_retraining_are_shared_out_too_and_those_of_windows_stay_the_same(tmp_path: Path) -> None:
    without = mixture({"a": 1, "b": 1}, num_samples=8).samples(byte_tokenizer(), seed=1, cache=tmp_path)
    source = mixture({"a": 1, "b": 1}, num_samples=8, num_retraining=3)
    samples = source.samples(byte_tokenizer(), seed=1, cache=tmp_path)
    assert torch.equal(samples.calibration_ST, without.calibration_ST) and samples.description == without.description
    assert torch.equal(samples.held_out_ST, without.held_out_ST)
    assert Counter(Counter(text).most_common(1)[0][0] for text in texts(samples.retraining_ST)) == {"a": 2, "b": 1}
    with pytest.raises(ValueError, match=r"lower data\.num_samples, data\.num_retraining or"):
        mixture({"a": 1, "b": 1}, num_samples=8, num_retraining=10**5).samples(byte_tokenizer(), cache=tmp_path)


def test_the_seed_shuffles_and_a_source_keeps_its_own_settings(tmp_path: Path) -> None:
    source = mixture({"a": 1, "b": 1}, num_samples=12)
    first, again, other = (source.samples(byte_tokenizer(), seed=seed, cache=tmp_path) for seed in (0, 0, 1))
    assert torch.equal(first.calibration_ST, again.calibration_ST)
    orders = [
        "".join(Counter(text).most_common(1)[0][0] for text in texts(one.calibration_ST)) for one in (first, other)
    ]
    assert orders[0] != orders[1] and "aaaaaabbbbbb" not in orders
    assert source.sources["a"].num_samples == 10**6


def test_no_document_is_in_two_parts_whichever_source_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Same(Letter):
        def documents(self, part: Part) -> Iterable[str]:
            return [f"{self.letter * 4}{part:<12}" * 20, "shared" * 40]

    source = Mixture(sources={"a": Same("a"), "b": Same("b")}, weights={"a": 1, "b": 1}, evaluation=Same("e"), **SMALL)
    samples = source.samples(byte_tokenizer(), cache=tmp_path)
    assert not any("share" in text for text in texts(torch.cat([samples.calibration_ST, samples.held_out_ST])))
    assert caplog.text.count("are left out: another part has them too") == 4


def test_generated_text_and_another_source(tmp_path: Path) -> None:
    def mixed(generated: float) -> Mixture:
        sources = {"generated": SelfGenerated(temperature=0.9), "docs": PythonDocs()}
        return Mixture(sources=sources, weights={"generated": generated, "docs": 1}, **SMALL)

    tokenizer, source = telling_tokenizer(), mixed(3)
    source.check()
    assert source.needs_model and not mixed(0).needs_model
    samples = source.samples(tokenizer, cache=tmp_path, model=model_of("llama"))
    own = SelfGenerated(**SMALL | {"num_samples": 6, "num_held_out": 3}, temperature=0.9)
    generated = own.samples(tokenizer, cache=tmp_path, model=model_of("llama"))
    docs = PythonDocs(**SMALL | {"num_samples": 2, "num_held_out": 1}).samples(tokenizer, cache=tmp_path)
    for part in ("calibration_ST", "held_out_ST"):
        together = torch.cat([getattr(generated, part), getattr(docs, part)]).tolist()
        assert sorted(getattr(samples, part).tolist()) == sorted(together)
    assert torch.equal(samples.evaluation_ST, docs.evaluation_ST)
    assert samples.description.startswith("6 samples of self_generated (temperature 0.9) and 2 samples of python_docs")
    plain = mixed(0).samples(tokenizer, cache=tmp_path)  # without a model
    assert plain.description.startswith("8 samples of python_docs")


def test_what_is_wrong_names_the_setting_where_it_stands(tmp_path: Path) -> None:
    missing = Files(paths=str(tmp_path / "data.txt"))
    sources = {"generated": SelfGenerated(temperature=0), "mine": missing}
    source = Mixture(sources=sources, weights={"generated": 1, "mine": 1}, evaluation=missing, num_samples=0)
    with pytest.raises(ValueError) as error:
        source.check()
    said = str(error.value).splitlines()
    starts = ["data.num_samples=0:", "data.evaluation.paths:", "data.sources.generated.temperature=0:"]
    assert [line.startswith(start) for line, start in zip(said, starts, strict=False)] == [True] * 3
    assert said[3].startswith(f"data.sources.mine.paths: {tmp_path}/data.txt is not there")


@pytest.mark.parametrize(
    ("sources", "weights", "said"),
    [
        ({}, {}, r"data.sources=\{\}: give each by a name"),
        ({"a": "c4"}, {"a": 1}, "data.sources.a='c4' is no source of text; .*data@data.sources.a=python_docs"),
        (
            {"a": Letter("a")},
            {"b": 1},
            r"data.weights=\{'b': 1\}: give each of the sources its weight, such as \{a: 1\}",
        ),
        ({"a": Letter("a")}, [1], r"data.weights=\[1\]: give each of the sources its weight"),
        ({"a": Letter("a")}, {"a": -1}, "data.weights.a=-1: give a number, 0 or more"),
        ({"a": Letter("a")}, {"a": "x"}, "data.weights.a='x': give a number, 0 or more"),
        ({"a": Letter("a")}, {"a": 0}, r"data.weights=\{'a': 0\}: all are 0"),
    ],
)
def test_sources_and_weights_that_do_not_fit_are_refused(sources: dict, weights: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mixture(sources=sources, weights=weights)
