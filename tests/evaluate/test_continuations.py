"""Continuations are those of transformers' own generate, whatever the batch, and repetition is told."""

from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from conftest import letter_tokenizer, telling_tokenizer
from transformers import GenerationConfig, PreTrainedModel

from lit_recon.data.generation import with_gumbel_numbers
from lit_recon.evaluate.continuations import (
    PROMPTS,
    Continuation,
    Decoding,
    continuations_as_json,
    continue_prompts,
    encode_prompts,
    num_steps,
)
from lit_recon.model.architectures import tiny_model

TEXTS = ["a river", "of", "the old mill in the morning"]


def alone(model: PreTrainedModel, text: str, new: int) -> list[int]:
    """Greedy, one token after the other, without a cache: until the end."""
    tokens = letter_tokenizer()(text)["input_ids"]
    made: list[int] = []
    while len(made) < new:
        with torch.no_grad():
            logits_BTV = model(torch.tensor([tokens + made]), use_cache=False).logits
        token = int(logits_BTV[0, -1].argmax())
        if token == model.config.eos_token_id:
            break
        made.append(token)
    return made


@pytest.mark.parametrize("shape", ["llama", "gpt2", "opt", "bloom", "gemma2"])
def test_a_greedy_continuation_is_the_most_likely_token_each_time_whatever_the_batch(shape: str) -> None:
    model = tiny_model(shape)
    expected = [alone(model, text, 12) for text in TEXTS]
    for size in (1, 3):
        found = continue_prompts(model, letter_tokenizer(), TEXTS, Decoding(max_new_tokens=12, batch_size=size))
        assert [list(one.tokens) for one in found] == expected
    assert [one.text for one in found] == [letter_tokenizer().decode(tokens) for tokens in expected]


def test_a_continuation_ends_before_the_token_that_ends_a_text() -> None:
    model, tokenizer = tiny_model("llama"), letter_tokenizer()
    whole = continue_prompts(model, tokenizer, TEXTS[:1], Decoding(max_new_tokens=10))[0].tokens
    assert len(whole) == 10
    at = next(place for place, token in enumerate(whole) if place and token not in whole[:place])
    model.generation_config.eos_token_id = [63, whole[at]]
    assert continue_prompts(model, tokenizer, TEXTS[:1], Decoding(max_new_tokens=10))[0].tokens == whole[:at]


def test_the_models_own_settings_of_generate_and_its_mode_are_put_aside_and_come_back() -> None:
    model, tokenizer = tiny_model("opt"), letter_tokenizer()  # with dropout
    few = Decoding(max_new_tokens=12)
    plain = continue_prompts(model, tokenizer, TEXTS, few)
    model.generation_config = settings = GenerationConfig(repetition_penalty=9.0, do_sample=True, top_k=3)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert [one.tokens for one in continue_prompts(model, tokenizer, TEXTS, few)] == [one.tokens for one in plain]
    assert model.training and model.generation_config is settings
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_draws_depend_on_the_prompt_and_the_seed_and_not_on_the_batch_or_the_process() -> None:
    model, tokenizer = tiny_model("llama"), letter_tokenizer()

    def drawn(texts: list[str], **settings: Any) -> list[tuple[int, ...]]:
        decoding = Decoding(max_new_tokens=10, **{"temperature": 1.0, "seed": 3} | settings)
        return [one.tokens for one in continue_prompts(model, tokenizer, texts, decoding)]

    torch.manual_seed(0)
    once = drawn(TEXTS)
    state = torch.get_rng_state()
    assert drawn(TEXTS[::-1], batch_size=1) == once[::-1]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn(TEXTS, seed=4) != once
    assert drawn(TEXTS, temperature=1e-6) == drawn(TEXTS, temperature=0.0) != once


def test_draws_follow_the_probabilities_at_the_temperature() -> None:
    logits_V, num_rows = torch.tensor([0.0, 1.0, 3.0, -2.0]), 4000
    generators = [torch.Generator().manual_seed(row) for row in range(num_rows)]
    drawn_B = with_gumbel_numbers(logits_V.expand(num_rows, 4), 2.0, generators).argmax(-1)
    expected_V = (logits_V / 2).softmax(-1)
    shares_V = drawn_B.bincount(minlength=4) / num_rows
    assert ((shares_V - expected_V).abs() < 4 * (expected_V * (1 - expected_V) / num_rows).sqrt()).all()


def test_a_chat_template_is_used_when_asked_and_only_then() -> None:
    model, tokenizer = tiny_model("llama"), telling_tokenizer()
    with pytest.raises(ValueError, match="chat=true: the tokenizer has no chat template"):
        encode_prompts(model, tokenizer, ["hi"], Decoding(chat=True, max_new_tokens=4))
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}bot:"
    plain, chat = (encode_prompts(model, tokenizer, ["hi"], Decoding(chat=c, max_new_tokens=4))[0] for c in (0, 1))
    assert plain == tokenizer("hi")["input_ids"]
    assert tokenizer.decode(chat).replace(" ", "") == "<s>user:hi\nbot:"


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [("", 4, "has no tokens"), ("a" * 60, 6, "60 tokens: with 6 new ones it is beyond the model's context of 64")],
)
def test_prompts_that_cannot_be_continued_are_refused(prompt: str, new: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        continue_prompts(tiny_model("llama"), letter_tokenizer(), [prompt], Decoding(max_new_tokens=new))


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"temperature": float("nan")}, {"max_new_tokens": 0}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Decoding(**settings)


def test_repetition_is_the_share_of_four_grams_that_occurred_before() -> None:
    def repetition(*tokens: int) -> float:
        return Continuation("", tokens).repetition

    assert repetition() == repetition(1, 1, 1) == 0
    assert repetition(*range(20)) == 0
    assert repetition(1, 2, 3, 4, 1, 2, 3, 4) == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234
    assert repetition(*[7] * 13) == pytest.approx(9 / 10)
    assert repetition(*range(4), *[5, 6] * 10) == pytest.approx(1 - (4 + 2) / 21)


def test_a_text_degenerates_where_a_loop_is_most_of_it() -> None:
    words, loop = tuple(range(100, 140)), (1, 2, 3, 4, 5)
    assert not Continuation("", words + 4 * loop).degenerates
    assert Continuation("", words[:20] + 9 * loop).degenerates


def test_no_text_by_people_degenerates() -> None:
    words = " ".join(topics.values()).split()
    numbers = {word: index for index, word in enumerate(dict.fromkeys(words))}
    pieces = [tuple(numbers[word] for word in words[start : start + 64]) for start in range(0, len(words), 64)]
    assert len(pieces) > 500 and not any(Continuation("", piece).degenerates for piece in pieces)


def test_states_stand_side_by_side() -> None:
    dense, checkpoint = [Continuation("x y", (1, 2))], [Continuation("aaaa", (7,) * 14)]
    assert continuations_as_json(["p"], {"dense": dense, "checkpoint": checkpoint}) == [
        {
            "prompt": "p",
            "texts": {"dense": "x y", "checkpoint": "aaaa"},
            "repetition": {"dense": 0.0, "checkpoint": pytest.approx(10 / 11)},
            "degenerates": {"dense": False, "checkpoint": True},
        }
    ]
    assert len(set(PROMPTS)) == len(PROMPTS) >= 4


@pytest.mark.parametrize("batch_size", [1, 2])
def test_all_steps_are_told_also_where_a_text_ends_before(batch_size: int) -> None:
    model, told = tiny_model("llama"), []
    decoding = Decoding(max_new_tokens=10, batch_size=batch_size)
    first = continue_prompts(model, letter_tokenizer(), TEXTS[:1], decoding)[0].tokens[0]
    model.generation_config.eos_token_id = first  # the first text ends at once
    continue_prompts(model, letter_tokenizer(), TEXTS, decoding, advanced=told.append)
    assert sum(told) == num_steps(TEXTS, decoding) == 10 * -(-len(TEXTS) // batch_size)
    assert max(told) > 1 or batch_size > 1
