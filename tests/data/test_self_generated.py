"""Text that the dense model samples: distributed as the model says, whatever the batch; cached, and read without it."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import EVERY_SHAPE, letter_tokenizer, model_of, telling_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_recon import PythonDocs, Samples, SelfGenerated, TextSource
from lit_recon.data.generation import DenseModel, Sampling, generate
from lit_recon.data.packing import PADDING
from lit_recon.data.source import Part

BOS, EOS = 47, 48  # after the letters
SAMPLING = Sampling(prompt=(BOS,), end=EOS, vocabulary=49, temperature=1.0, batch_size=4, seed=0)
NAMES = [f"calibration {number}" for number in range(7)]


class Alphabet(TextSource):
    def documents(self, part: Part) -> list[str]:
        return ["abcdefghijklmnopqrstuvwxyz" * 10]


SMALL = {"num_samples": 5, "length": 24, "num_held_out": 2, "evaluation_samples": 2, "evaluation_length": 32}
SMALL |= {"evaluation": Alphabet()}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return telling_tokenizer()


@pytest.fixture
def brief() -> Iterator[PreTrainedModel]:
    """A tiny model that ends its documents soon: the logit of the end is larger by 3."""
    model, more_V = model_of("llama"), torch.zeros(64).index_fill(0, torch.tensor(EOS), 3.0)
    hook = model.get_output_embeddings().register_forward_hook(lambda head, inputs, logits: logits + more_V)
    yield model
    hook.remove()


def unloadable(model: PreTrainedModel) -> DenseModel:
    """A model of which only the signature is there."""

    def load() -> PreTrainedModel:
        raise AssertionError("the model was loaded")

    return replace(DenseModel.from_model(model), load=load)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_as_often_as_the_model_says(temperature: float) -> None:
    model, many = model_of("llama"), 4000
    sampling = replace(SAMPLING, temperature=temperature, batch_size=1000)
    rows = generate(model, sampling, [str(number) for number in range(many)], room=2, joined=False)
    first = Counter(row[0] for row in rows)
    logits_V = model(torch.tensor([[BOS]])).logits[0, -1].double()
    logits_V[49:] = logits_V[EOS] = -torch.inf  # no token of the tokenizer's; a document is not empty
    expected_V = torch.softmax(logits_V / temperature, 0) * many
    for token, expected in enumerate(expected_V.tolist()):
        assert abs(first[token] - expected) <= 4 * expected**0.5 + 1, token
    likeliest = first.most_common(1)[0][0]
    second = Counter(row[1] for row in rows if row[0] == likeliest)
    logits_V = model(torch.tensor([[BOS, likeliest]])).logits[0, -1].double()
    logits_V[49:] = -torch.inf
    for token, share in enumerate(torch.softmax(logits_V / temperature, 0).tolist()):
        expected = share * first[likeliest]
        assert abs(second[token] - expected) <= 4 * expected**0.5 + 1, token


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_a_sample_does_not_depend_on_its_batch_nor_on_how_many_there_are(shape: str) -> None:
    model = model_of(shape)
    alone = generate(model, replace(SAMPLING, batch_size=1), NAMES, room=8, joined=True)
    assert all(len(row) == 8 for row in alone) and len({tuple(row) for row in alone}) == len(NAMES)
    assert generate(model, SAMPLING, NAMES[:5], room=8, joined=True) == alone[:5]


def test_a_document_that_ends_is_followed_by_another_that_does_not_know_it(brief: PreTrainedModel) -> None:
    joined = generate(brief, SAMPLING, NAMES, room=24, joined=True)
    single = generate(brief, SAMPLING, NAMES, room=24, joined=False)
    assert all(2 <= len(row) <= 24 for row in single) and any(len(row) < 24 for row in single)
    assert all(row[-1] == EOS and row.count(EOS) == 1 for row in single if len(row) < 24)
    for whole, first in zip(joined, single, strict=True):
        assert len(whole) == 24 and whole[: len(first)] == first
    # what follows an end is drawn from the start's distribution: here the same token mostly, as the logits are steep
    logits_V = brief(torch.tensor([[BOS]])).logits[0, -1].double()
    logits_V[49:] = logits_V[EOS] = -torch.inf
    likely = torch.softmax(logits_V, 0)
    starts = [after for row in joined for before, after in zip(row, row[1:], strict=False) if before == EOS]
    assert len(starts) > 20
    mean = (likely.log().nan_to_num(neginf=0) * likely).sum()
    assert abs(likely[starts].log().mean() - mean) < 1.0
    assert EOS not in starts


def test_seed_and_temperature_change_the_text_and_the_process_stays_as_it_was() -> None:
    model = copy.deepcopy(model_of("opt"))  # which has dropout
    model.train()
    model.generation_config.top_k = model.generation_config.num_beams = 2
    settings, before = model.generation_config, torch.get_rng_state()
    first, again = (generate(model, SAMPLING, NAMES, room=8, joined=True) for _ in range(2))
    assert first == again == generate(model_of("opt"), SAMPLING, NAMES, room=8, joined=True)
    assert first != generate(model, replace(SAMPLING, seed=1), NAMES, room=8, joined=True)
    assert first != generate(model, replace(SAMPLING, temperature=0.5), NAMES, room=8, joined=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and all(module.training for module in model.modules())
    assert model.generation_config is settings


def test_samples_are_full_and_evaluation_is_that_of_the_other_source(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    settings = {name: value for name, value in SMALL.items() if name != "evaluation"}
    source = SelfGenerated(**settings)
    source.check()
    samples = source.samples(tokenizer, seed=3, cache=tmp_path, model=model_of("llama"))
    other = PythonDocs(**settings).samples(tokenizer, seed=0, cache=tmp_path)
    assert samples.calibration_ST.shape == (5, 24) and samples.held_out_ST.shape == (2, 24)
    assert samples.calibration_ST.dtype == samples.held_out_ST.dtype == torch.int64
    assert 0 <= samples.calibration_ST.min() and samples.calibration_ST.max() < 49
    assert torch.equal(samples.evaluation_ST, other.evaluation_ST)
    assert samples.evaluation_description == other.evaluation_description
    assert samples.description == f"self_generated (temperature 1); evaluation: {other.description}"
    assert len(torch.cat([samples.calibration_ST, samples.held_out_ST]).unique(dim=0)) == 7


@pytest.mark.parametrize("bos", ["auto", True, False])
def test_samples_are_opened_like_other_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, bos: object) -> None:
    samples = SelfGenerated(**SMALL, bos=bos).samples(tokenizer, cache=tmp_path, model=model_of("llama"))
    assert samples.opening == ("<s>" if bos is True else "none")
    assert ((samples.calibration_ST[:, 0] == BOS).all() and samples.calibration_ST.shape == (5, 24)) or bos is not True
    if bos is not True:  # the token before the text is no part of it
        assert (samples.calibration_ST[:, 0] != BOS).any()


def test_by_documents_each_sample_is_one_document_padded(
    brief: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = SelfGenerated(**SMALL | {"num_samples": 20}, packing="documents")
    tokens_ST = source.samples(tokenizer, cache=tmp_path, model=brief).calibration_ST
    ends = (tokens_ST == EOS).long().argmax(1)
    padded = tokens_ST == PADDING
    assert padded.any()
    for row, end, padding in zip(tokens_ST, ends.tolist(), padded, strict=True):
        assert padding.sum() == (24 - 1 - end if EOS in row else 0) and not padding[:2].any()


def test_a_second_run_reads_the_cache_and_loads_no_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model, source = model_of("llama"), SelfGenerated(**SMALL)

    def drawn(seed: int = 0, model: object = unloadable(model), **settings: object) -> Samples:
        return replace(source, **settings).samples(tokenizer, seed=seed, cache=tmp_path, model=model)

    first = drawn(model=model)
    assert torch.equal(drawn().calibration_ST, first.calibration_ST)
    assert torch.equal(drawn().held_out_ST, first.held_out_ST)
    changes: list[dict] = [{"seed": 1}, {"temperature": 0.9}, {"length": 25}, {"num_samples": 6}, {"bos": True}]
    for change in [*changes, {"packing": "documents"}, {"generation_batch_size": 2}]:
        with pytest.raises(AssertionError, match="was loaded"):
            drawn(**change)
    other = copy.deepcopy(model)
    other.get_output_embeddings().weight[3, 3] += 1e-3
    with pytest.raises(AssertionError, match="was loaded"):
        drawn(model=unloadable(other))
    assert not torch.equal(drawn(seed=1, model=model).calibration_ST, first.calibration_ST)
    for path in (tmp_path / "tokens").iterdir():
        path.unlink()
    assert torch.equal(drawn(model=model).calibration_ST, first.calibration_ST)


def test_more_samples_keep_those_there_were(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    few, many = (
        SelfGenerated(**SMALL | {"num_samples": number}).samples(tokenizer, cache=tmp_path, model=model_of("llama"))
        for number in (3, 9)
    )
    assert torch.equal(many.calibration_ST[:3], few.calibration_ST) and torch.equal(many.held_out_ST, few.held_out_ST)
    apart = SelfGenerated(**SMALL | {"num_samples": 3, "num_retraining": 6})
    samples = apart.samples(tokenizer, cache=tmp_path, model=model_of("llama"))
    assert torch.equal(samples.calibration_ST, few.calibration_ST)
    assert torch.equal(samples.retraining_ST, many.calibration_ST[3:])
    assert torch.equal(samples.held_out_ST, few.held_out_ST)


def test_samples_that_repeat_are_warned_of(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    SelfGenerated(**SMALL, temperature=1e-6).samples(tokenizer, cache=tmp_path, model=model_of("llama"))
    assert "6 of 7 generated samples repeat another: raise data.temperature" in caplog.text


def nothing(model: PreTrainedModel) -> None:
    """Change nothing."""


def not_finite(model: PreTrainedModel) -> None:
    model.get_output_embeddings().weight[7, 0] = torch.nan


def silent(model: PreTrainedModel) -> None:
    model.can_generate = lambda: False


@pytest.mark.parametrize(
    ("change", "settings", "tokens", "said"),
    [
        (
            not_finite,
            {},
            telling_tokenizer,
            r"logits are not finite at token 0 of a text .*logit 7 is nan.*model.dtype",
        ),
        (silent, {}, telling_tokenizer, "LlamaForCausalLM generates no text in transformers; use another source"),
        (
            nothing,
            {"length": 65},
            telling_tokenizer,
            "data.length: texts of 65 tokens .* 64 tokens .*lower data",
        ),
        (nothing, {}, letter_tokenizer, "neither a BOS nor an end-of-text token .*use another source"),
        (nothing, {"evaluation_samples": 10**6}, telling_tokenizer, "Alphabet: .*lower data.evaluation_samples"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    change: Callable, settings: dict, tokens: Callable, said: str, tmp_path: Path
) -> None:
    model = copy.deepcopy(model_of("llama"))
    change(model)
    source = SelfGenerated(**SMALL | settings)
    with pytest.raises(ValueError, match=said):
        source.samples(tokens(), cache=tmp_path, model=model)


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    tokenizer = telling_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(20)])
    tokenizer.eos_token = "<19>"
    with pytest.raises(ValueError, match="token 68 is none of the model's, whose embedding has 64 rows"):
        SelfGenerated(**SMALL).samples(tokenizer, cache=tmp_path, model=model_of("llama"))


def test_without_the_model_it_is_said_how_to_give_it(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dense model generates its text; give samples\(tokenizer, model=model\)"):
        SelfGenerated(**SMALL).samples(tokenizer, cache=tmp_path)


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf"), float("nan"), "hot", True])
def test_a_temperature_is_a_number_above_0(temperature: object) -> None:
    with pytest.raises(ValueError, match=r"data.temperature=.*: give a number above 0"):
        SelfGenerated(temperature=temperature).check()


def test_all_wrong_settings_are_in_one_message() -> None:
    with pytest.raises(ValueError) as error:
        SelfGenerated(temperature=0, generation_batch_size=0, num_samples=0, evaluation=Alphabet(length=1)).check()
    for said in ("data.temperature=0:", "data.generation_batch_size=0:", "data.num_samples=0:"):
        assert said in str(error.value)
    assert "data.evaluation.length=1: give a whole number, 2 or more" in str(error.value)
    with pytest.raises(ValueError, match=r"data.evaluation='wikitext2' is no source .*data@data.evaluation=wikitext2"):
        SelfGenerated(evaluation="wikitext2")
