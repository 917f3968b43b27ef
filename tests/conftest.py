"""Tiny random models, one per layer shape that exists now, and a command line that runs in this process. No network."""

import logging
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lit_recon import fit
from lit_recon.compute import Compute

VOCABULARY = 64
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    # sequential halves, rotary positions
    "llama": lambda: LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64),
    # layers that differ: every second one attends to a window of 8 tokens
    "gemma2": lambda: Gemma2Config(
        **SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=8, max_position_embeddings=64
    ),
    # Conv1D matrices, stored (inputs, outputs)
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    # parallel halves
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=64),
    # dropout in its default configuration
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    # positions as a bias that the model hands to each layer
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4),
}
CPU = Compute(torch.device("cpu"), "32-true")


def tiny_model(kind: str, **changes: object) -> PreTrainedModel:
    """A random model with weights large enough that its layers matter."""
    config = CONFIGS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each tiny model in turn."""
    return tiny_model(request.param)


@pytest.fixture
def tokens_ST() -> torch.Tensor:
    """Random tokens, longer than the tiny sliding window."""
    return torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token per lower-case letter, digit or blank."""
    letters = "_ abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-\n"
    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="_")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs of random words, the same in every run."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(60)))
    return path


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees or fills the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LIT_RECON_CACHE", str(folder))
    return folder


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ended]]:
    """`python -m lit_recon.fit` with these arguments, in this process and an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # python -m has the working directory there

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["fit", *arguments])
        capfd.readouterr()
        try:
            fit.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return Ended(status, *capfd.readouterr())

    handlers = logging.root.handlers[:]
    yield run
    logging.root.handlers = handlers


@pytest.fixture
def tiny_run(command: Callable[..., Ended], model_folder: Path, text_file: Path) -> Callable[..., Ended]:
    """The real configuration, shrunk to the tiny model."""
    settings = [
        "model=hf",
        f"model.name={model_folder}",
        "data=files",
        f"data.paths=[{text_file}]",
        "data.num_samples=8",
        "data.length=32",
        "data.num_held_out=4",
        "data.evaluation_samples=4",
        "data.evaluation_length=32",
        "module.optimizer.lr=1e-2",
        "output_dir=run",
    ]

    def run(*overrides: str) -> Ended:
        chosen = {override.partition("=")[0] for override in overrides}
        own = {"data": f"data.paths=[{text_file}]", "model": f"model.name={model_folder}"}  # of one member only
        dropped = {setting for group, setting in own.items() if group in chosen}
        return command(*(setting for setting in settings if setting not in dropped), *overrides)

    return run
