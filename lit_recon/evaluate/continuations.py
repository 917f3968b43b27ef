"""Continuations: dense, pruned and reconstructed models go on with the same prompts, side by side.

Greedy, or drawn at a temperature by Gumbel numbers of which each prompt has its own (generation.py), so that a text
depends on its prompt and the seed alone. Whether a text degenerates is told by its repetition, seq-rep-4 of Welleck et
al. (arXiv 1908.04319): 1 - |different 4-grams| / |4-grams|.

Shapes: B prompts of a batch, T tokens, V rows of the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_recon.data.generation import evaluating, seed_of, with_gumbel_numbers
from lit_recon.model.decoder import moved_to

PROMPTS = (
    "The river had risen overnight, and in the morning the people of the village",
    "To bake bread at home, you need flour, water, salt and",
    "The most important difference between a plant and an animal is that",
    "Question: How many days are there in two weeks?\nAnswer:",
    'def mean(numbers):\n    """Return the arithmetic mean of a list of numbers."""\n',
)
GRAM = 4  # tokens
# Repetition above which a loop makes up most of a text. Of 1,728 pieces of 64 tokens of Python's documentation none has
# more than 0.45; SmolLM2 is above it, greedily, in 5 of 16 texts, and pruned to half by magnitude in 16 of 16.
DEGENERATE = 0.5


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How prompts are continued.

    Attributes:
        max_new_tokens: Tokens of a continuation at most.
        temperature: Divides the logits that tokens are drawn from; 0: the most likely token each time.
        seed: Of what is drawn.
        batch_size: Prompts at once.
        chat: Whether prompts are put into the tokenizer's chat template, as what a user says.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 8
    chat: bool = False

    def __post_init__(self) -> None:
        """Raise a ValueError for what cannot be."""
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} batch_size={self.batch_size}: expected at least 1 of each."
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: expected 0 (greedy) or a positive number, such as 0.8.")


@dataclass(frozen=True)
class Continuation:
    """How a model went on.

    Attributes:
        text: The text.
        tokens: Its tokens, without the one that ends it.
    """

    text: str
    tokens: tuple[int, ...]

    @property
    def repetition(self) -> float:
        """Share of its 4-grams of tokens that occurred in it before, 0 to 1; 0 where it has fewer than 4 tokens."""
        grams = [self.tokens[start : start + GRAM] for start in range(len(self.tokens) - GRAM + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0

    @property
    def degenerates(self) -> bool:
        """Whether most of the text repeats itself."""
        return self.repetition > DEGENERATE


def continuations_as_json(
    prompts: Sequence[str], by_state: Mapping[str, Sequence[Continuation]]
) -> list[dict[str, Any]]:
    """The entry `continuations` of evaluations.json, given the continuations of each state ("dense", ...)."""
    return [
        {
            "prompt": prompt,
            "texts": {state: made[index].text for state, made in by_state.items()},
            "repetition": {state: made[index].repetition for state, made in by_state.items()},
            "degenerates": {state: made[index].degenerates for state, made in by_state.items()},
        }
        for index, prompt in enumerate(prompts)
    ]


def encode_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], decoding: Decoding
) -> list[list[int]]:
    """Tokens of each prompt, as the model expects them at the start of a text; needs no weights.

    Raises:
        ValueError: A model that generates no text, a tokenizer without a chat template, or a prompt that is empty or
            does not fit into the context.
    """
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} generates no text in transformers; leave the prompts out.")
    if decoding.chat and not tokenizer.chat_template:
        raise ValueError("chat=true: the tokenizer has no chat template; use chat=false, or an instruction model.")
    encoded = [_encode(tokenizer, prompt, decoding.chat) for prompt in prompts]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if not tokens:
            raise ValueError(f"prompt {prompt!r} has no tokens, and this model's texts start with none; write a word.")
        needed = len(tokens) + decoding.max_new_tokens - 1  # the last token is not read
        if isinstance(longest, int) and needed > longest:
            raise ValueError(
                f"prompt {prompt[:40]!r} has {len(tokens)} tokens: with {decoding.max_new_tokens} new ones it is "
                f"beyond the model's context of {longest} tokens; shorten it, or lower max_new_tokens."
            )
    return encoded


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    """Tokens of a prompt; a chat template writes the tokens that open a text itself."""
    if not chat:
        return list(tokenizer(prompt)["input_ids"])
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    decoding: Decoding | None = None,
    *,
    device: torch.device | None = None,
    advanced: Callable[[int], None] = lambda steps: None,
) -> list[Continuation]:
    """Continue prompts with a model, in its own dtype and without its own settings of `generate`, such as a top_p.

    Args:
        model: The model, in memory or mapped; it is left as it was.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        decoding: How; None: greedy, 64 tokens.
        device: Where; all of the model is moved there and back. None: where it is.
        advanced: Is told of steps that are done, `num_steps` in all.

    Raises:
        ValueError: What `encode_prompts` finds, or a device without the memory.
    """
    decoding = decoding or Decoding()
    encoded = encode_prompts(model, tokenizer, prompts, decoding)
    ends = _ends(model, tokenizer)
    found: list[tuple[int, ...]] = []
    with moved_to(model, device or model.device), evaluating(model):
        for start in range(0, len(encoded), decoding.batch_size):
            rows = slice(start, start + decoding.batch_size)
            names = [f"{decoding.seed} {prompt}" for prompt in prompts[rows]]
            count = _Count(advanced)
            found += _batch(model, encoded[rows], names, ends, decoding, count)
            advanced(decoding.max_new_tokens - count.steps)  # of a batch whose texts all end before
    return [Continuation(str(tokenizer.decode(list(tokens), skip_special_tokens=True)), tokens) for tokens in found]


def num_steps(prompts: Sequence[str], decoding: Decoding) -> int:
    """Tokens one after the other that a model computes at most: those of each batch of prompts."""
    return -(-len(prompts) // decoding.batch_size) * decoding.max_new_tokens


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text: those of the model's own settings, and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return sorted({token for token in (*listed, tokenizer.eos_token_id) if isinstance(token, int)})


def _batch(
    model: PreTrainedModel,
    encoded: Sequence[Sequence[int]],
    names: Sequence[str],
    ends: list[int],
    decoding: Decoding,
    count: "_Count",
) -> list[tuple[int, ...]]:
    """Continue some prompts together, padded on the left; the tokens of each until its end."""
    width = max(map(len, encoded))
    tokens_BT = torch.tensor([[0] * (width - len(row)) + list(row) for row in encoded], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=model.device)
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,  # _Draw draws
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,  # after the end; cut off below
    )
    draw = [_Draw(decoding.temperature, names)] if decoding.temperature else []
    try:
        made_BT = model.generate(  # type: ignore[operator]
            tokens_BT,
            attention_mask=mask_BT,
            generation_config=config,
            logits_processor=LogitsProcessorList([*draw, count]),
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"batch_size={decoding.batch_size}: {len(encoded)} prompts at once and the whole model do not fit into the "
            "device's memory; lower it, or use the CPU."
        ) from error
    rows = made_BT[:, width:].tolist()
    return [tuple(row[: next((at for at, token in enumerate(row) if token in ends), len(row))]) for row in rows]


class _Count(LogitsProcessor):
    """Counts the tokens of a batch one after the other; logits stay as they are."""

    def __init__(self, advanced: Callable[[int], None]) -> None:
        self.advanced, self.steps = advanced, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The same logits."""
        self.steps += 1
        self.advanced(1)
        return scores


class _Draw(LogitsProcessor):
    """Adds Gumbel numbers to logits, those of each row by a generator of its own."""

    def __init__(self, temperature: float, names: Sequence[str]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed_of(name)) for name in names]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits of the next tokens, (B, V), of which the largest are the draws."""
        return with_gumbel_numbers(scores, self.temperature, self.generators)
