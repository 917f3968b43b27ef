"""Conversations become text by the tokenizer's own template; pieces of texts are the texts."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from text_and_tokens import EOS, ascii_ids, byte_tokenizer, write_rows
from transformers import PreTrainedTokenizerFast

from lit_recon.data.documents import (
    PIECE_CHARACTERS,
    WHOLE_CHARACTERS,
    Conversation,
    cut,
    joined,
    read_document,
    render,
)
from lit_recon.data.files import Files
from lit_recon.data.hub import Hub
from lit_recon.data.packing import pack

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<eos>\n{% endfor %}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)
TOLD = "<user>Hi<eos>\n<assistant>Hello<eos>\n"
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
PARTED = [{"role": one["role"], "content": [{"type": "text", "text": one["content"]}]} for one in MESSAGES]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("messages", [MESSAGES, SHAREGPT, PARTED])
def test_every_form_of_messages_is_rendered_by_the_template(tokenizer, messages):
    conversation = read_document({"chat": messages}, "chat")
    assert isinstance(conversation, Conversation)
    assert render([conversation, "text"], tokenizer, origin="x") == [TOLD.strip().removesuffix("<eos>"), "text"]


def test_other_keys_of_messages_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ messages[0].tool_calls[0].name }}"
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}]
    assert render([read_document({"m": messages}, "m")], tokenizer, origin="x") == ["f"]


def test_between_conversations_is_one_end_of_text_token(tokenizer, tmp_path):
    texts = render([read_document({"m": MESSAGES}, "m")] * 2, tokenizer, origin="x")
    one = [*ascii_ids("<user>Hi"), EOS, *ascii_ids("\n<assistant>Hello")]
    assert pack(texts, tokenizer, length=2 * len(one) + 1, cache=tmp_path).tolist() == [[*one, EOS, *one]]


def test_a_template_that_names_the_date_gives_the_same_text_every_day(tokenizer):
    tokenizer.chat_template = """{% if strftime_now is defined %}
        {%- for form in ['%d %b %Y', '%Y-%m-%d', '%d %B %Y'] %}{{ strftime_now(form) }}, {% endfor %}
    {%- endif %}"""
    expected = "01 Jan 2025, 2025-01-01, 01 January 2025,"
    assert render([read_document({"m": MESSAGES}, "m")], tokenizer, origin="x") == [expected]


def test_conversations_that_the_template_refuses_are_left_out_and_all_of_them_are_an_error(tokenizer, caplog):
    refused = read_document({"m": [{"role": "system", "content": "x"}]}, "m")
    kept = read_document({"m": MESSAGES}, "m")
    assert len(render([refused, kept], tokenizer, origin="chat.jsonl")) == 1
    assert "chat.jsonl" in caplog.text and "refuses 1 conversations (no system role); they are left out" in caplog.text
    with pytest.raises(ValueError, match=r"chat.jsonl.* refuses all conversations \(no system role\)"):
        render([refused], tokenizer, origin="chat.jsonl")


def test_without_a_template_conversations_are_refused():
    with pytest.raises(ValueError, match="chat.jsonl: it holds conversations, but .* no chat template; use a model"):
        render([read_document({"m": MESSAGES}, "m")], byte_tokenizer(), origin="chat.jsonl")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "field 'm' holds int, not text or messages"),
        ({"role": "user"}, "holds dict, not text or messages"),
        (["a"], "holds list, not text or messages"),
        ([{"question": "a", "answer": "b"}], r"a list of \{question, answer\}; messages have role and content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages of image; only text can be used"),
    ],
)
def test_what_is_neither_text_nor_messages_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        read_document({"m": value}, "m")


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_chat_files_and_chat_data_sets_give_samples(tokenizer, tmp_path, column):
    messages = {"messages": MESSAGES, "conversations": SHAREGPT}[column]
    rows = [{column: [messages[0] | {list(messages[0])[1]: f"Hi {number}"}, messages[1]]} for number in range(20)]
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "train.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    settings = {"num_samples": 2, "length": 20, "num_held_out": 1, "evaluation_samples": 1, "evaluation_length": 20}
    sources = [Files(paths=str(path), field=column, **settings) for path in tmp_path.rglob("*.*")]
    for source in [*sources, Hub(name=str(tmp_path / "set"), field=column, **settings)]:
        source.check()
        evaluation = source.samples(tokenizer, cache=tmp_path / "cache").evaluation_ST[0].tolist()
        assert evaluation[:9] == ascii_ids("<user>Hi ") and EOS in evaluation
    assert len(sources) == 2


def test_a_conversation_is_one_piece_and_a_document_of_its_own():
    conversation = Conversation(json.dumps(MESSAGES) * 1000)
    assert list(cut(conversation)) == [conversation]
    found = list(joined(["a", "b", conversation, "c"], "-"))
    assert found == ["a-b", conversation, "c"] and isinstance(found[1], Conversation)


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("Words and words. " * 1000, ". "),
        ("\u3053\u308c\u306f\u6587\u3067\u3059\u3002" * 1000, "\u3002"),
        ("words and words\n" * 1000, "\n"),
        ("x" * 10_000, "x"),
        ("x" * WHOLE_CHARACTERS, "x"),
    ],
)
def test_a_text_is_cut_after_a_sentence_or_a_blank_where_it_has_them(text, end):
    pieces = list(cut(text))
    assert "".join(pieces) == text
    longest = PIECE_CHARACTERS if len(text) > WHOLE_CHARACTERS else WHOLE_CHARACTERS
    assert all(longest / 2 <= len(piece) <= longest and piece.endswith(end) for piece in pieces[:-1])
    assert pieces[-1].endswith(end) and len(pieces[-1]) <= longest
