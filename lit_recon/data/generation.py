"""Generation of documents by the dense model, in batches of which each row has random numbers of its own.

A token is the argmax over the vocabulary of logits / temperature + g with independent Gumbel numbers g, which is a draw
from softmax(logits / temperature) (Maddison et al., arXiv 1411.0030). So transformers' greedy `generate` samples: a
document depends on its name and the seed, hardly on its batch, and the process's random state stays as it is.

Shapes: B documents of a batch, T tokens, V rows of the vocabulary.
"""

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from lit_recon.system.console import Console
from lit_recon.system.finite import NotFinite, first_not_finite
from lit_recon.system.units import duration

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0  # between two lines of progress, where no bar can move


@dataclass(frozen=True)
class DenseModel:
    """The dense model, for a source that generates text; it is loaded only where the text is not in the cache.

    Attributes:
        signature: What its logits depend on, such as a hash of its files.
        load: The model, on the device on which it generates.
    """

    signature: Callable[[], str]
    load: Callable[[], PreTrainedModel]

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> "DenseModel":
        """A model that is loaded already, where it is."""
        return cls(lambda: _hash(model), lambda: model)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How documents are sampled.

    Attributes:
        prompt: Tokens before each document, at least one; they are no part of it.
        end: The token that ends a document, and is its last; None: none does.
        vocabulary: Number of tokens that may be drawn: those that the tokenizer knows.
        temperature: Divides the logits.
        batch_size: Documents that are sampled together.
        seed: Of all that is drawn.
    """

    prompt: tuple[int, ...]
    end: int | None
    vocabulary: int
    temperature: float
    batch_size: int
    seed: int


def generate(
    model: PreTrainedModel, sampling: Sampling, names: Sequence[str], *, room: int, joined: bool
) -> list[list[int]]:
    """Sample documents and fill samples with them; each document starts anew, without those before it.

    Args:
        model: The dense model; it is left as it was.
        sampling: How.
        names: Of the samples. Each depends on its name and the seed, not on how many others there are.
        room: Tokens of each sample.
        joined: Whether a document that ends early is followed by another until the sample is full; else each sample is
            one document, which may be shorter.

    Raises:
        ValueError: The model cannot generate such texts, its logits are not finite, or memory does not suffice.
    """
    _check(model, sampling, room)
    rows: list[list[int]] = [[] for _ in names]
    with evaluating(model), _Shown(total=len(names) * room) as shown:
        for turn in itertools.count():
            left = [i for i, row in enumerate(rows) if len(row) < room and (joined or not row)]
            left.sort(key=lambda i: len(rows[i]))  # those of a batch take about as long
            if not left:
                break
            for start in range(0, len(left), sampling.batch_size):
                batch = left[start : start + sampling.batch_size]
                most = room - len(rows[batch[0]])
                drawn = _documents(model, sampling, [f"{names[i]} {turn}" for i in batch], most, shown)
                for i, document in zip(batch, drawn, strict=True):
                    rows[i] += document[: room - len(rows[i])]
                shown.done(sum(room if row and not joined else len(row) for row in rows))
    return rows


def _check(model: PreTrainedModel, sampling: Sampling, room: int) -> None:
    """Raise a ValueError where a model cannot generate documents that fill `room`."""
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} generates no text in transformers; use another source of text")
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    used = [*sampling.prompt, *([] if sampling.end is None else [sampling.end])]
    if max(used) >= len(embedding):
        raise ValueError(
            f"the tokenizer's token {max(used)} is none of the model's, whose embedding has {len(embedding)} rows; use "
            "the model's own tokenizer"
        )
    longest, needed = getattr(model.config.get_text_config(), "max_position_embeddings", None), room
    needed += len(sampling.prompt) - 1  # the last token is not read
    if isinstance(longest, int) and needed > longest:
        raise ValueError(
            f"data.length: texts of {needed} tokens are beyond the context that the model was trained with, {longest} "
            "tokens (max_position_embeddings), so that it cannot generate them; lower data.length"
        )


def _documents(
    model: PreTrainedModel, sampling: Sampling, names: Sequence[str], most: int, shown: "_Shown"
) -> list[list[int]]:
    """Sample a batch of documents of at most `most` tokens each."""
    prompt_BT = torch.tensor([sampling.prompt] * len(names), device=model.device)
    config = GenerationConfig(
        max_new_tokens=most,
        do_sample=False,  # _Draw draws
        use_cache=True,
        eos_token_id=sampling.end,
        pad_token_id=sampling.end or 0,  # after the end; cut off below
    )
    draw = _Draw(sampling, names, shown)
    try:
        tokens_BT = model.generate(  # type: ignore[operator]
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"data.generation_batch_size={sampling.batch_size}: {len(names)} texts at once and the whole model do not "
            "fit into the device's memory; lower it, or use trainer.accelerator=cpu"
        ) from error
    rows = tokens_BT[:, len(sampling.prompt) :].tolist()
    return [row[: row.index(sampling.end) + 1] if sampling.end in row else row for row in rows]


class _Draw(LogitsProcessor):
    """Adds Gumbel numbers to logits, so that the largest is a draw; the numbers of each row are its own.

    A document has at least one token before its end.
    """

    def __init__(self, sampling: Sampling, names: Sequence[str], shown: "_Shown") -> None:
        self.sampling, self.shown = sampling, shown
        self.generators = [torch.Generator().manual_seed(seed_of(f"{sampling.seed} {name}")) for name in names]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits of the next tokens, (B, V), with Gumbel numbers."""
        token = input_ids.shape[1] - len(self.sampling.prompt)
        if (found := first_not_finite(scores)) is not None:
            raise NotFinite(
                f"the dense model's logits are not finite at token {token} of a text that it generates "
                f"(logit {found[1]} is {scores[found]}); its weights are damaged, or its dtype is too narrow for it: "
                "try model.dtype=float32"
            )
        scores = scores.double()
        scores[:, self.sampling.vocabulary :] = -torch.inf
        if token == 0 and self.sampling.end is not None:
            scores[:, self.sampling.end] = -torch.inf
        self.shown.step(len(scores))
        return with_gumbel_numbers(scores, self.sampling.temperature, self.generators)


def with_gumbel_numbers(scores: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Logits (B, V) over the temperature plus Gumbel numbers, in float64: the largest of each row is a draw.

    Args:
        scores: Logits of the next token of each row.
        temperature: Divides them.
        generators: On the CPU, one for each row.
    """
    # In float64 no exponential number is 0, of which the logarithm would win whatever its logit; on the CPU, so that
    # all devices draw the same.
    drawn = torch.empty(scores.shape, dtype=torch.float64)
    for row, generator in zip(drawn, generators, strict=True):
        row.exponential_(generator=generator)
    return scores.double() / temperature - drawn.log_().to(scores.device)


class _Shown:
    """Progress of a generation: a bar with the time left, or a line now and then where none can move."""

    def __init__(self, total: int) -> None:
        self._total, self._start = total, time.perf_counter()
        self._said = self._start
        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._progress.add_task("generating text", total=total)

    def __enter__(self) -> "_Shown":
        """Show it."""
        self._progress.start()
        log.info("the dense model generates %d tokens of text, once", self._total)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Take the bar down, also after an error."""
        self._progress.stop()
        seconds = time.perf_counter() - self._start
        if kind is None:
            log.info("generated in %s, %.0f tokens per second", duration(seconds), self._total / seconds)

    def step(self, tokens: int) -> None:
        """So many more tokens were drawn, of which some may not be used."""
        self._progress.advance(self._task, tokens)

    def done(self, tokens: int) -> None:
        """So many tokens are there."""
        self._progress.update(self._task, completed=tokens)
        now = time.perf_counter()
        if self._progress.disable and now - self._said >= LINE_SECONDS and 0 < tokens < self._total:
            self._said = now
            left = (now - self._start) * (self._total / tokens - 1)
            log.info("%d of %d tokens, %s left", tokens, self._total, duration(left))


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """A context in which a model has no dropout, and none of its own settings of `generate`, such as a top_p."""
    training = {module: module.training for module in model.modules()}
    settings = model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
        for module, was in training.items():
            module.training = was


def seed_of(name: str) -> int:
    """A seed made of a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _hash(model: PreTrainedModel) -> str:
    """Hash of the weights and the configuration of a model that is loaded, and of its kind of device."""
    digest = hashlib.sha256(f"{model.device.type} {model.config.to_json_string(use_diff=False)}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
