"""TextSource, the base of all sources of text. A source names its documents; here they become samples of tokens.

Three parts share no text: calibration samples train the windows, held-out samples decide whether a window's training
is accepted, evaluation samples give the perplexity. Further calibration samples, which the windows have not seen, may
train all layers at once. The seed draws calibration and held-out samples; the evaluation
samples are always the same, so that perplexities of different seeds compare.

Shapes: P pieces, S samples, T tokens.
"""

import copy
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_recon.data.documents import render
from lit_recon.data.generation import DenseModel
from lit_recon.data.packing import PADDING, Bos, Packing, draw, find_opening, pack, token_stream
from lit_recon.system.cache import cache_folder

log = logging.getLogger(__name__)

Part = Literal["calibration", "held_out", "evaluation"]

CHARACTERS_PER_TOKEN = 32
AT_LEAST_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Samples:
    """Samples of tokens, int64, of the three parts, and the name of the data set.

    Rows of calibration_ST and held_out_ST may end with PADDING (lit_recon.data.packing), which is no token of any
    vocabulary: replace it before tokens are embedded. Rows of evaluation_ST are full.

    Attributes:
        calibration_ST: (num_samples, length), to train windows on.
        held_out_ST: (num_held_out, length), to judge windows by.
        evaluation_ST: (evaluation_samples, evaluation_length), for perplexity.
        description: The data set, for plan and model card.
        evaluation_description: The data set of evaluation_ST, for the protocol.
        evaluation_split: Its split, where it has one of its own; else what part of the text it is.
        opening: What the tokenizer put at the start of each sample, such as `<s>`, or "none".
        opening_length: Tokens of it.
        retraining_ST: (num_retraining, length), to train all layers at once on; None where that is calibration_ST.
    """

    calibration_ST: Tensor
    held_out_ST: Tensor
    evaluation_ST: Tensor
    description: str
    evaluation_description: str = ""
    evaluation_split: str = "evaluation"
    opening: str = "none"
    opening_length: int = 0
    retraining_ST: Tensor | None = None

    def shape(self, width: int) -> tuple[int, int, int]:
        """Shape (S, T, width) of an array with `width` numbers per token of the calibration and held-out samples."""
        num_samples, length = self.calibration_ST.shape
        return num_samples + len(self.held_out_ST), length, width

    @property
    def num_given(self) -> int:
        """First tokens of each sample that no text decides, and no model is measured at: its opening, one at least."""
        return max(1, self.opening_length)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the calibration samples, without padding."""
        return int((self.calibration_ST != PADDING).sum())

    @property
    def num_retraining_tokens(self) -> int:
        """Number of tokens that only all layers at once are trained on, without padding."""
        return 0 if self.retraining_ST is None else int((self.retraining_ST != PADDING).sum())


@dataclass(frozen=True)
class Request:
    """What samples are made for, and what was found so far.

    Attributes:
        tokenizer: Of the model that will see the samples.
        seed: Chooses among calibration and held-out text.
        cache: Folder that keeps what was made before.
        model: The dense model, for sources that generate text.
        taken: Documents of the parts that were read, of which none is read again.
        problems: Why there are too few samples.
    """

    tokenizer: PreTrainedTokenizerBase
    seed: int
    cache: Path
    model: DenseModel | PreTrainedModel | None = None
    taken: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


class Drawn(NamedTuple):
    """Samples of tokens of one source, int64.

    Attributes:
        calibration_ST: (num_samples, length).
        held_out_ST: (num_held_out, length).
        retraining_ST: (num_retraining, length).
    """

    calibration_ST: Tensor
    held_out_ST: Tensor
    retraining_ST: Tensor


@dataclass(kw_only=True)
class TextSource(ABC):
    """Text for calibration and evaluation, and how many samples of how many tokens to take of it.

    A source of your own names its documents. A document that two parts name is kept in one of them only, evaluation
    before held-out before calibration. With this in `mine.py`, `data=custom data._target_=mine.Poems` uses it:

        from pathlib import Path
        from lit_recon.data.source import TextSource

        class Poems(TextSource):
            def documents(self, part):
                folder = {"calibration": "train", "held_out": "validation", "evaluation": "test"}[part]
                return (path.read_text() for path in sorted(Path("poems", folder).glob("*.txt")))

    Documents are read until there are 32 characters for each token asked for, a mebibyte at least: in English about
    eight times what is needed, so that the seed has a choice, without reading all of a large data set.

    Attributes:
        num_samples: Calibration samples.
        num_retraining: Samples of their own for all layers at once, which windows are not pruned or trained by; 0: the
            calibration samples.
        length: Tokens of each calibration and held-out sample.
        packing: `fixed` cuts these samples from all documents joined; with `documents` each is of one document, and
            padded where it is shorter. Evaluation samples are `fixed` always, so that perplexities compare.
        bos: Whether samples start with BOS; "auto": with what the tokenizer puts before a text by itself.
        batch_size: Samples of a batch.
        num_held_out: Held-out samples.
        evaluation_samples: Sequences for perplexity, the first of the evaluation part; None takes all.
        evaluation_length: Tokens of each.
    """

    num_samples: int = 32
    length: int = 256
    packing: Packing = "fixed"
    bos: Bos = "auto"
    batch_size: int = 2
    num_held_out: int = 4
    num_retraining: int = 0
    evaluation_samples: int | None = 16
    evaluation_length: int = 512

    @abstractmethod
    def documents(self, part: Part) -> Iterable[str]:
        """Documents of a part, texts or Conversations, in an order that does not depend on a seed.

        They are read only as far as needed.

        Raises:
            ValueError: They cannot be read.
        """

    def describe(self, part: Part) -> str:
        """Name of the data set that a part is taken from, for plan, protocol and model card."""
        return type(self).__name__

    def split_name(self, part: Part) -> str:
        """Name of the data set's split that a part is, for the protocol; where lit_recon divides the text, the part."""
        return part

    def is_one_text(self, part: Part) -> bool:
        """Whether the documents of a part are one text, such as the joined lines of WikiText, and not many."""
        return False

    def check(self) -> None:
        """Find what is wrong with the settings, without reading more than the start of the text.

        Raises:
            ValueError: With all problems that can be found together.
        """
        problems = self._problems()
        if problems:
            raise ValueError("\n".join(problems))

    def text_files(self) -> list[Path]:
        """The files of the user's own that its text is read from, by which a run can be traced back to it."""
        return []

    def hub_datasets(self) -> list[str]:
        """The Hub's ids of the data sets that calibration samples are taken from, for the model card."""
        return []

    @property
    def needs_model(self) -> bool:
        """Whether samples can be made only with the dense model, which generates them."""
        return False

    def samples(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        cache: Path | None = None,
        model: DenseModel | PreTrainedModel | None = None,
    ) -> Samples:
        """Read, tokenize and pack the three parts, and draw the samples.

        Args:
            tokenizer: Of the model that will see the samples.
            seed: Chooses among calibration and held-out text.
            cache: Folder in which `tokens/` keeps what was tokenized before; None: the cache folder.
            model: The dense model, where `needs_model`.

        Raises:
            ValueError: The text cannot be read or generated, or there is too little of it.
        """
        request = Request(tokenizer, seed, cache or cache_folder(), model)
        opening, opening_length = self._opening(tokenizer)
        evaluation_PT = self._packed("evaluation", request)
        request.problems.extend(self._shortage("evaluation", evaluation_PT))
        drawn = self._drawn(request)
        if request.problems:
            raise ValueError("\n".join(request.problems))
        calibration, evaluation = self.describe("calibration"), self.describe("evaluation")
        return Samples(
            calibration_ST=drawn.calibration_ST,
            held_out_ST=drawn.held_out_ST,
            retraining_ST=drawn.retraining_ST if self.num_retraining else None,
            evaluation_ST=evaluation_PT[: self.evaluation_samples].long(),
            description=calibration if calibration == evaluation else f"{calibration}; evaluation: {evaluation}",
            evaluation_description=evaluation,
            evaluation_split=self.split_name("evaluation"),
            opening=opening,
            opening_length=opening_length,
        )

    def evaluation_stream(self, tokenizer: PreTrainedTokenizerBase, *, cache: Path | None = None) -> Tensor:
        """Tokens of the evaluation part in one row, without any opening, of which `samples` cuts its sequences.

        Args:
            tokenizer: Of the model that will see them.
            cache: Folder in which `tokens/` keeps what was tokenized before; None: the cache folder.

        Returns:
            int64, (T): all tokens, or enough of them for `evaluation_samples` sequences.

        Raises:
            ValueError: The text cannot be read.
        """
        texts = render(self._read("evaluation", set()), tokenizer, origin=self.describe("evaluation"))
        return token_stream(texts, tokenizer, cache=cache or cache_folder(), bos=self.bos)

    def _drawn(self, request: Request) -> Drawn:
        """What is trained on or judged by; where there is too little text less, with problems in the request."""
        held_out_PT = self._packed("held_out", request)
        taken = set(request.taken)
        calibration_PT = self._packed("calibration", request)
        number = min(self.num_samples, len(calibration_PT))
        retraining_ST, short = calibration_PT[:0].long(), self._shortage("calibration", calibration_PT)
        if self.num_retraining and not short:
            retraining_ST, short = self._others(number, len(calibration_PT), replace(request, taken=taken))
        request.problems[:0] = [*short, *self._shortage("held_out", held_out_PT)]
        return Drawn(
            draw(calibration_PT, number, seed=request.seed),
            draw(held_out_PT, min(self.num_held_out, len(held_out_PT)), seed=request.seed),
            retraining_ST,
        )

    def _others(self, number: int, of: int, request: Request) -> tuple[Tensor, list[str]]:
        """Retraining samples, none of which is a calibration sample, and the problem if there are fewer.

        Args:
            number: Calibration samples that are drawn.
            of: The pieces that they are drawn from, the first ones also where more text is read.
            request: As it was before calibration text was read.
        """
        both = copy.copy(self)
        both.num_samples += self.num_retraining
        pieces_PT = both._packed("calibration", request)
        if short := both._shortage("calibration", pieces_PT):
            return pieces_PT[:0].long(), short
        left = torch.ones(len(pieces_PT), dtype=torch.bool)
        left[draw(torch.arange(of), number, seed=request.seed)] = False
        return draw(pieces_PT[left], self.num_retraining, seed=request.seed), []

    def _problems(self) -> list[str]:
        """Problems of the settings; a source with settings of its own extends the list."""
        smallest = {"num_samples": 1, "length": 2, "batch_size": 1, "num_held_out": 1, "evaluation_length": 2}
        smallest["num_retraining"] = 0
        if self.evaluation_samples is not None:
            smallest["evaluation_samples"] = 1
        problems = [
            f"data.{name}={getattr(self, name)!r}: give a whole number, {least} or more"
            for name, least in smallest.items()
            if type(getattr(self, name)) is not int or getattr(self, name) < least
        ]
        if self.packing not in get_args(Packing):
            problems.append(f"data.packing={self.packing!r}: choose one of {', '.join(get_args(Packing))}")
        if self.bos != "auto" and type(self.bos) is not bool:
            problems.append(f"data.bos={self.bos!r}: choose one of auto, true, false")
        return problems

    def _opening(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
        """Tokens that open each sample, as text, and their number; a ValueError where they leave no room."""
        tokens = find_opening(tokenizer, self.bos)
        opening = "".join(str(token) for token in tokenizer.convert_ids_to_tokens(tokens))
        short = [name for name in ("length", "evaluation_length") if getattr(self, name) <= len(tokens)]
        if short:
            raise ValueError(
                f"data.{short[0]}={getattr(self, short[0])}: the tokenizer opens each sample with {len(tokens)} tokens "
                f"({opening}); give {len(tokens) + 1} or more"
            )
        return opening or "none", len(tokens)

    def _asked(self, part: Part) -> tuple[str, int | None, str, int]:
        """Settings of a part with their values: how many samples, and of how many tokens."""
        if part == "evaluation":
            return "evaluation_samples", self.evaluation_samples, "evaluation_length", self.evaluation_length
        if part == "held_out":
            return "num_held_out", self.num_held_out, "length", self.length
        setting = "num_samples, data.num_retraining" if self.num_retraining else "num_samples"
        return setting, self.num_samples, "length", self.length

    def _packing(self, part: Part) -> Packing:
        return "fixed" if part == "evaluation" else self.packing

    def _packed(self, part: Part, request: Request) -> Tensor:
        """Read and pack a part, without documents that are taken: int32, (P, T)."""
        *_, length = self._asked(part)
        texts = render(self._read(part, request.taken), request.tokenizer, origin=self.describe(part))
        packing, cache = self._packing(part), request.cache
        return pack(texts, request.tokenizer, length=length, cache=cache, packing=packing, bos=self.bos)

    def _read(self, part: Part, taken: set[str]) -> list[str]:
        """Enough documents of a part, none of which is `taken`; adds them to `taken`."""
        _, number, _, length = self._asked(part)
        enough = math.inf if number is None else max(AT_LEAST_CHARACTERS, CHARACTERS_PER_TOKEN * number * length)
        texts: list[str] = []
        size, repeated = 0, 0
        for text in self.documents(part):
            if text in taken:
                repeated += 1
            elif text:
                texts.append(text)
                size += len(text)
                if size >= enough:
                    break
        if repeated:
            log.warning("%d documents of the %s part are left out: another part has them too", repeated, part)
        taken.update(texts)
        return texts

    def _shortage(self, part: Part, pieces_PT: Tensor) -> list[str]:
        """The problem, if there are fewer pieces than asked for."""
        setting, number, length_setting, length = self._asked(part)
        needed = 1 if number is None else number
        if len(pieces_PT) >= needed:
            return []
        most = "at most " if self._packing(part) == "documents" else ""
        return [
            f"{self.describe(part)}: the {part} part has {len(pieces_PT)} samples of {most}{length} tokens "
            f"({int((pieces_PT != PADDING).sum())} tokens), asked for are {needed} ({most}{needed * length} tokens); "
            f"lower data.{setting} or data.{length_setting}, or give more text"
        ]
