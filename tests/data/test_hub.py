"""Data sets of the Hub: parts share no document, no more is read than needed, mistakes are named."""

import socket
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from text_and_tokens import PARTS, all_text, byte_tokenizer, library_logs, write_rows
from transformers import PreTrainedTokenizerFast

from lit_recon.data import hub
from lit_recon.data.hub import Hub

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data set in the Hub's layout: 100 rows to train, 5 to test."""
    write_rows(tmp_path / "set" / "train.jsonl", [{"text": f"train {number}", "id": number} for number in range(100)])
    write_rows(tmp_path / "set" / "test.jsonl", [{"text": f"test {number}", "id": number} for number in range(5)])
    return tmp_path / "set"


def test_one_split_is_dealt_out_without_a_common_document(folder):
    source = Hub(name=str(folder))
    source.check()
    parts = all_text(source)
    assert [len(parts[part]) for part in PARTS] == [70, 10, 20]
    assert len({text for documents in parts.values() for text in documents}) == 100


def test_evaluation_may_have_a_split_of_its_own(folder):
    source = Hub(name=str(folder), evaluation={"split": "test"})
    source.check()
    parts = all_text(source)
    assert parts["evaluation"] == [f"test {number}" for number in range(5)]
    assert (len(parts["calibration"]), len(parts["held_out"])) == (90, 10)
    assert source.describe("calibration") == f"{folder} train" and source.describe("evaluation") == f"{folder} test"


def test_a_part_is_called_by_its_split_where_it_has_one_of_its_own(folder, tokenizer, tmp_path):
    assert Hub(name=str(folder), evaluation={"split": "test"}).split_name("evaluation") == "test"
    shared = Hub(name=str(folder), data_files="train.jsonl")
    assert shared.split_name("evaluation") == "evaluation part of train"
    settings = {"num_samples": 2, "length": 8, "evaluation_samples": 1, "evaluation_length": 8}
    source = Hub(name=str(folder), evaluation={"split": "test"}, **settings)
    assert source.samples(tokenizer, cache=tmp_path).evaluation_split == "test"


@pytest.mark.parametrize("member", ["wikitext2", "c4", "minipile"])
def test_the_evaluation_of_the_papers_data_sets_is_a_test_split(member):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        source = instantiate(compose("fit", overrides=[f"data={member}"]).data, _convert_="all")
    assert source.split_name("evaluation") == "test" and source.is_one_text("evaluation")
    assert source.is_one_text("calibration") == (member == "wikitext2")


def test_evaluation_may_be_another_data_set_with_another_field(folder, tmp_path):
    write_rows(tmp_path / "other" / "validation.jsonl", [{"body": "to evaluate"}])
    evaluation = {"name": str(tmp_path / "other"), "split": "validation", "field": "body"}
    assert list(Hub(name=str(folder), evaluation=evaluation).documents("evaluation")) == ["to evaluate"]


def test_blank_rows_are_no_documents(tmp_path):
    write_rows(tmp_path / "set" / "train.jsonl", [{"text": text} for text in ("a", "", " \n", None, "b", "c", "d")])
    assert all_text(Hub(name=str(tmp_path / "set"))) == {
        "calibration": ["a", "b", "c"],
        "held_out": [],
        "evaluation": ["d"],
    }


def test_data_files_choose_among_the_files(folder):
    source = Hub(name=str(folder), data_files=["test.jsonl"])
    assert sum(map(len, all_text(source).values())) == 5


def test_lines_of_one_text_are_joined_as_papers_join_wikitext(tmp_path):
    rows = ["", " = Title = \n", "", " A paragraph . \n"]
    write_rows(tmp_path / "wiki" / "test.jsonl", [{"text": row} for row in rows])
    source = Hub(name=str(tmp_path / "wiki"), split="test", separator="\n\n", evaluation={"split": "test"})
    assert list(source.documents("evaluation")) == ["\n\n".join(rows)]


def test_joined_lines_are_dealt_out_in_blocks_that_keep_their_context(tmp_path):
    rows = [f"{number:05} ".ljust(100, "x") for number in range(4000)]
    write_rows(tmp_path / "wiki" / "train.jsonl", [{"text": row} for row in rows])
    parts = all_text(Hub(name=str(tmp_path / "wiki"), separator="\n"))
    assert sorted("\n".join(text for documents in parts.values() for text in documents).split("\n")) == rows
    first = parts["evaluation"][0].split("\n")
    assert len(first) > 100 and first == rows[int(first[0][:5]) :][: len(first)]
    assert len(parts["held_out"]) == 2  # of 20 blocks


@pytest.mark.parametrize("rows", [1, 4])
def test_a_few_giant_rows_are_divided_among_the_parts(tmp_path, rows):
    text = "".join(f"Sentence {number} of a giant row. " for number in range(12_000 // rows))
    write_rows(tmp_path / "set" / "train.jsonl", [{"text": f"{number}. {text}"} for number in range(rows)])
    parts = all_text(Hub(name=str(tmp_path / "set")))
    shares = [sum(map(len, parts[part])) / (rows * len(text)) for part in PARTS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.06)
    assert sorted("".join(sum(parts.values(), []))) == sorted("".join(f"{number}. {text}" for number in range(rows)))


@pytest.mark.parametrize("brackets", ["[]", ('{"a":', "}")], ids=["lists", "objects"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_json_that_is_nested_too_deeply_is_one_message(tmp_path, monkeypatch, brackets, first, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    opening, closing = brackets
    deep = f'{{"text": "deep", "more": {opening * 100_000}1{closing * 100_000}}}'
    flat = '{"text": "a text of [ and { and \\\\", "more": ' + "[" * 50 + "1" + "]" * 50 + "}"
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join([deep, flat] if first else [*[flat] * 100, deep]) + "\n")
    with pytest.raises(ValueError, match="^data set .*: .*nested too deeply"):
        list(Hub(name=str(folder), streaming=streaming).documents("calibration"))


def test_levels_of_json_are_those_of_its_brackets_outside_of_texts():
    for content, levels in (
        (b'{"text": "a"}', 1),
        (b'{"a": [{"b": 1}, {"b": 2}], "c": {"d": [[]]}}', 4),
        (b'{"te{{xt": "[[[ \\" [[["}\n[1, [2]]', 2),
        (b'"[[[\\\\" [ ] "', 1),
        (b"", 0),
    ):
        assert hub._levels(memoryview(content)) == levels, content


def test_a_data_set_without_rows_is_one_message(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="data set .*set train has no rows"):
        Hub(name=str(tmp_path / "set")).check()


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(folder, monkeypatch, caplog):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nothing/datasets")
    for streaming in (True, False):
        assert len(list(Hub(name=str(folder), streaming=streaming).documents("calibration"))) == 70
    assert caplog.text.count("/proc/nothing/datasets: No such file or directory; what it would keep is in") == 1
    assert "set HF_HOME to a folder that can be written" in caplog.text


def test_streaming_reads_no_further_than_the_samples_need(tokenizer, tmp_path, monkeypatch):
    reads = []

    def endless(*_: object, **arguments: object) -> Iterator[dict]:
        assert arguments["streaming"] is True
        reads.append(0)
        while True:
            reads[-1] += 1
            yield {"text": f"{reads[-1]} ".ljust(1 << 14, "x")}

    monkeypatch.setattr(hub, "load_dataset", endless)
    (tmp_path / "set").mkdir()
    source = Hub(name=str(tmp_path / "set"), num_samples=2, length=64, evaluation_samples=2)
    for part in PARTS:
        vars(source).pop("_dataset", None)
        source._read(part, set())
    # a mebibyte is 64 documents of 16 KiB; one in ten is held out, two are for evaluation
    assert reads[0] < 64 / 0.7 + 10 and 630 < reads[1] < 650 and reads[2] < 330


def test_without_streaming_a_split_is_kept_for_the_next_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    assert len(list(Hub(name=str(folder)).documents("calibration"))) == 70
    assert not list((tmp_path / "datasets").rglob("*.arrow"))
    assert len(list(Hub(name=str(folder), streaming=False).documents("calibration"))) == 70
    assert list((tmp_path / "datasets").rglob("*.arrow"))


def closed_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def test_an_unreachable_hub_is_one_message_with_the_alternative_and_without_a_wait(monkeypatch, caplog):
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: pytest.fail("went on to half a minute of attempts"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    with library_logs(caplog), pytest.raises(ValueError) as error:
        Hub(name="owner/some_set").check()
    assert "data set owner/some_set train: the Hub cannot be reached" in str(error.value)
    assert "data=files data.paths=[...]" in str(error.value)
    assert not caplog.records


@pytest.mark.parametrize("streaming", [True, False])
def test_offline_mode_is_the_same_message(monkeypatch, streaming):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot be reached .* data=files data.paths=\[\.\.\.\]"):
        Hub(name="owner/some_set", streaming=streaming).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "validation"}, r"validation.*train.*test"),
        ({"config": "nosuch"}, r"nosuch.*default"),
        ({"field": "body"}, r"no field 'body'; choose data.field from id, text"),
        ({"data_files": "nosuch.jsonl"}, r"nosuch.jsonl"),
        ({"evaluation": {"split": "nosuch"}}, r"nosuch.*train.*test"),
        ({"evaluation": {"splt": "test"}}, r"data.evaluation has splt; it may have name, config, split, field"),
        ({"evaluation": {"num_samples": 3}}, r"data.evaluation has num_samples"),
        ({"name": "not a name"}, r"data.name='not a name' is neither a folder here nor a Hub id"),
    ],
)
def test_what_a_data_set_lacks_is_named_with_what_it_has(folder, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        Hub(**{"name": str(folder), **settings}).check()
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"nothing train: .*data files"):
        Hub(name=str(tmp_path / "nothing")).check()


@pytest.mark.parametrize("member", ["c4", "wikitext2", "minipile"])
def test_data_sets_of_the_paper_are_evaluated_on_the_whole_wikitext_test_set(member):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        source = instantiate(compose(overrides=[f"+data={member}"]).data, _convert_="all")
    assert (source.num_samples, source.length, source.evaluation_length) == (128, 2048, 2048)
    assert source.evaluation_samples is None
    assert source.describe("evaluation") == "Salesforce/wikitext wikitext-2-raw-v1 test"
    assert source._evaluation.separator == "\n\n" and source._evaluation.data_files is None
