"""Windows of a text for perplexity: sequences of a model's context, and which of their tokens are predicted.

    no stride      |------|------|------|          as pruning papers cut; a rest that fills no window is dropped
    stride         |------|                        as in transformers' guide on perplexity: windows overlap, each
                      |---***|                     predicts the tokens (*) that none before it did, and the last is
                         |---***|                  shorter where the text ends

What the tokenizer puts before a text, such as BOS, opens every window, since a model expects it there; or the text
alone, as in the code of pruning papers (SparseGPT, Wanda), which tokenizes the joined test set once and cuts that.

Shapes: S windows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_recon.data.packing import PADDING

OpeningAt = Literal["window", "text"]


@dataclass(frozen=True)
class TextWindows:
    """Windows of a text.

    Attributes:
        tokens_ST: Token ids, int64; PADDING behind the end of the text.
        first_S: The first token of each that is predicted, 1 or more.
        stride: Tokens of text from the start of one to that of the next; None: they do not overlap.
    """

    tokens_ST: Tensor
    first_S: tuple[int, ...]
    stride: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted."""
        return int((self.tokens_ST != PADDING).sum()) - sum(self.first_S)

    def __getitem__(self, rows: slice) -> "TextWindows":
        """Some of the windows."""
        return TextWindows(self.tokens_ST[rows], self.first_S[rows], self.stride)


def cut(
    stream_T: Tensor,
    opening: Sequence[int],
    *,
    length: int,
    stride: int | None = None,
    number: int | None = None,
    opening_at: OpeningAt = "window",
) -> TextWindows:
    """Cut a text into windows.

    Args:
        stream_T: Its tokens, int64, without opening.
        opening: Tokens that the tokenizer puts before a text.
        length: Tokens of a window, its opening included.
        stride: Tokens from the start of one window to that of the next; None: they do not overlap.
        number: Windows, the first ones; None: all.
        opening_at: Whether every window is opened, or the text alone.

    Raises:
        ValueError: The text has fewer tokens than a window, or than were asked for; the stride leaves tokens out, or
            `opening_at` is neither.
    """
    if opening_at not in get_args(OpeningAt):
        raise ValueError(f"opening_at={opening_at!r}: choose one of {', '.join(get_args(OpeningAt))}.")
    repeated = len(opening) if opening_at == "window" else 0
    width = length - repeated  # tokens of text
    if stride is not None and not 0 < stride <= width:
        raise ValueError(
            f"data.stride={stride}: expected a whole number from 1 to {width}, which is what a window of {length} "
            f"tokens{f' takes of the text after its opening of {repeated}' if repeated else ''}; null: no overlap."
        )
    if opening_at == "text":
        stream_T = torch.cat([torch.tensor(opening, dtype=stream_T.dtype), stream_T])
    starts = _starts(len(stream_T), width, stride)[:number]
    if not starts or (number is not None and len(starts) < number):
        raise ValueError(
            f"the text has {len(stream_T)} tokens, which is {len(starts)} windows of {length} tokens; asked for are "
            f"{number or 1}; lower data.evaluation_length or data.evaluation_samples, or give more text."
        )
    tokens_ST = torch.full((len(starts), length), PADDING)
    tokens_ST[:, :repeated] = torch.tensor(opening[:repeated], dtype=torch.long)
    first_S, end = [], 0
    for row_T, start in zip(tokens_ST, starts, strict=True):
        text_T = stream_T[start : start + width]
        row_T[repeated : repeated + len(text_T)] = text_T
        given = len(opening) if repeated or start == 0 else 0
        first_S.append(max(1, given, repeated + end - start))
        end = start + len(text_T)
    return TextWindows(tokens_ST, tuple(first_S), stride)


def _starts(size: int, width: int, stride: int | None) -> list[int]:
    """Where windows start in a text of so many tokens."""
    if stride is None:
        return list(range(0, size - width + 1, width))
    if size < 2:
        return []
    ends = next(start for start in range(0, size, stride) if start + width >= size)  # the first that reaches the end
    return list(range(0, ends + 1, stride))
