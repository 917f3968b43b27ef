"""Documents of rows: texts, cut and joined, and conversations, which a tokenizer's chat template turns into text.

Conversations are read in two forms: `messages`, a list of {role, content}, and ShareGPT's `conversations`, a list of
{from, value}.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DOCUMENT_CHARACTERS = 1 << 21  # the longest document that rows are joined to: a tokenizer holds one at a time
WHOLE_CHARACTERS = 2000  # the longest text that is never divided among parts
PIECE_CHARACTERS = 500  # the longest piece of one that may be
_HALF = f".{{{PIECE_CHARACTERS // 2},{PIECE_CHARACTERS}}}"
_ANY = f".{{1,{PIECE_CHARACTERS}}}"
# To the end; else to the last sentence or blank in the second half of a piece; else anywhere.
PIECE = re.compile(rf"(?s){_ANY}\Z|{_HALF}(?:(?<=[.!?]\s)|(?<=[。！？]))|{_HALF}(?<=\s)|{_ANY}")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
# Before a template that names the date of today, so that samples of two days are the same.
NEW_YEAR = """{%- macro strftime_now(form) -%}
{{ form | replace('%d', '01') | replace('%m', '01') | replace('%b', 'Jan') | replace('%B', 'January')
| replace('%Y', '2025') }}
{%- endmacro -%}"""


class Conversation(str):
    """A conversation as JSON, a list of messages: a document that is not text yet."""


def check_field(field: str, columns: Iterable[str]) -> None:
    """Raise a ValueError if there is no column of this name."""
    if field not in columns:
        raise ValueError(f"no field {field!r}; choose data.field from {', '.join(sorted(map(str, columns)))}")


def read_document(row: Mapping[str, Any], field: str) -> str:
    """Text or Conversation in a column of a row; empty where there is none.

    Raises:
        ValueError: The column holds something else.
    """
    value = row.get(field)
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        return Conversation(json.dumps([_message(message, field) for message in value])) if value else ""
    raise ValueError(f"field {field!r} holds {type(value).__name__}, not text or messages")


def _message(message: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A message with `role` and `content`, whatever its form called them, and what else it has."""
    role, content = (message.get(a, message.get(b)) for a, b in (("role", "from"), ("content", "value")))
    if not isinstance(role, str):
        raise ValueError(f"field {field!r} holds a list of {{{', '.join(message)}}}; messages have role and content")
    if isinstance(content, list):  # of parts
        kinds = {part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__ for part in content}
        if kinds - {"text"}:
            raise ValueError(f"field {field!r} holds messages of {', '.join(sorted(kinds))}; only text can be used")
        content = "".join(part.get("text") or "" for part in content)
    others = {key: value for key, value in message.items() if value is not None and key not in ("from", "value")}
    return others | {"role": ROLES.get(role, role), "content": content}


def cut(text: str) -> Iterator[str]:
    """Pieces that together are the text, which are short where it is longer than WHOLE_CHARACTERS.

    A conversation is one piece.
    """
    whole = isinstance(text, Conversation) or len(text) <= WHOLE_CHARACTERS
    return iter([text]) if whole else (found[0] for found in PIECE.finditer(text))


def joined(texts: Iterable[str], separator: str, *, at_most: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Documents made of consecutive texts; each ends with the text that makes it longer than `at_most` characters.

    A conversation is a document of its own.
    """
    run: list[str] = []
    size = 0
    for text in texts:
        whole = isinstance(text, Conversation)
        if run and (whole or size > at_most):
            yield separator.join(run)
            run, size = [], 0
        if whole:
            yield text
        else:
            run.append(text)
            size += len(text) + len(separator)
    if run:
        yield separator.join(run)


def render(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, origin: str) -> list[str]:
    """Documents as text: conversations by the tokenizer's chat template, without those that the template refuses.

    What is no valid Unicode, such as half a surrogate pair, is replaced by question marks.

    Args:
        documents: Texts and conversations.
        tokenizer: Has the template.
        origin: What the documents are called in messages.

    Raises:
        ValueError: The tokenizer has no chat template, or it refuses all conversations.
    """
    texts: list[str] = []
    refused: list[str] = []
    for document in documents:
        if not isinstance(document, Conversation):
            texts.append(document)
            continue
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"{origin}: it holds conversations, but the model's tokenizer has no chat template; use a model that "
                "is trained to chat, or a column of plain text (data.field)"
            )
        try:
            texts.append(_render(json.loads(document), tokenizer))
        except Exception as error:  # a template is the model's own code
            refused.append(" ".join(str(error).split()))
    if refused:
        message = f"{origin}: the chat template of the model's tokenizer refuses %s conversations ({refused[0]})"
        if not texts:
            raise ValueError(message % "all")
        log.warning("%s; they are left out", message % len(refused))
    return [text.encode(errors="replace").decode() for text in texts]


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as text, without the end-of-text token that packing puts after each document."""
    template = NEW_YEAR + str(tokenizer.get_chat_template())
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert isinstance(text, str)
    return text.rstrip().removesuffix(str(tokenizer.eos_token or ""))
