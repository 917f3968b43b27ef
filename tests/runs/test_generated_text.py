"""Runs on text that their own model generates: once, with the same bytes when resumed, against real text elsewhere."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, content, numbers, telling_tokenizer
from transformers import PreTrainedModel

from lit_recon import SelfGenerated, load
from lit_recon.data.files import Files
from lit_recon.data.source import Samples
from lit_recon.fit import __main__ as fit
from lit_recon.model.loading import LanguageModel

SAID = "the dense model generates 384 tokens of text, once"


@pytest.fixture
def generated(
    tiny_run: Callable[..., Ended], model_folder: Path, text_file: Path, tmp_path: Path
) -> Callable[..., Ended]:
    """A tiny run on generated text, with the evaluation text of `tiny_run`."""
    model = shutil.copytree(model_folder, tmp_path / "telling")
    telling_tokenizer().save_pretrained(model)
    evaluation = ["data@data.evaluation=files", f"data.evaluation.paths=[{text_file}]"]

    def run(*overrides: str, data: str = "self_generated") -> Ended:
        return tiny_run(f"data={data}", f"model.name={model}", *evaluation, *overrides)

    return run


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often each run had loaded a model when it began, before it loads its own."""
    found: list[int] = []
    load_model, run, count = LanguageModel.load, fit.run, 0

    def counted(self: LanguageModel) -> PreTrainedModel:
        nonlocal count
        count += 1
        return load_model(self)

    def begun(*arguments: object) -> None:
        nonlocal count
        found.append(count)
        run(*arguments)
        count = 0

    monkeypatch.setattr(LanguageModel, "load", counted)
    monkeypatch.setattr(fit, "run", begun)
    return found


def test_a_plan_generates_the_text_that_the_run_then_reads(generated: Callable[..., Ended], loads: list[int]) -> None:
    planned = generated("plan=true")
    assert planned.status == 0, planned.err
    assert "on 256 tokens of self_generated (temperature 1)" in " ".join(planned.out.split())
    assert SAID in planned.out and not Path("run").exists()
    ended = generated()
    assert ended.status == 0, ended.err
    assert SAID not in ended.out
    assert loads == [1, 0]
    told = json.loads(Path("run/results.json").read_text())
    assert told["protocol"]["dataset"] == "words.txt"
    assert all(window["held_out_after"] < window["held_out_before"] for window in told["windows"])


def test_the_peak_of_a_plan_is_no_less_than_what_generation_took(
    generated: Callable[..., Ended], tiny_run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_recon.fit.run.Clock.peak", lambda *_: 123 * 10**9)
    planned = generated("plan=true")
    assert planned.status == 0 and "peak memory 123.00 GB" in " ".join(planned.out.split()), planned
    planned = tiny_run("plan=true")
    assert planned.status == 0 and "123.00 GB" not in planned.out, "this process, before the run, generated nothing"


def test_a_resumed_run_ends_with_the_same_bytes_also_without_the_cache(
    generated: Callable[..., Ended], command: Callable[..., Ended], own_cache: Path
) -> None:
    mixed = ["data@data.sources.other=python_docs", "data.weights.other=0.6"]
    whole = generated(*mixed, "output_dir=whole", data="mixture")
    assert whole.status == 0, whole.err
    assert "5 samples of self_generated (temperature 1) and 3 samples of python_docs" in " ".join(whole.out.split())
    first = generated(*mixed, "stop_after=1", data="mixture")
    assert first.status == 0 and SAID not in first.out, first.err
    shutil.rmtree(own_cache / "tokens")
    other = command("resume=run", "data@data.evaluation=python_docs")
    assert other.status == 2 and "data.evaluation" in other.err
    ended = command("resume=run")
    assert ended.status == 0, ended.err
    assert "tokens of text, once" in ended.out
    assert numbers(Path("run")) == numbers(Path("whole"))
    assert content(Path("run/checkpoint")) == content(Path("whole/checkpoint"))


def test_the_library_generates_what_the_command_does(
    generated: Callable[..., Ended], text_file: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(str(tmp_path / "telling"))
    settings = {"num_samples": 8, "length": 32, "num_held_out": 4, "evaluation_samples": 4, "evaluation_length": 32}
    source = SelfGenerated(**settings, evaluation=Files(paths=str(text_file)))
    samples = source.samples(tokenizer, seed=0, model=model)
    shutil.rmtree(own_cache / "tokens")

    def compared(skeleton: PreTrainedModel, others: Samples) -> None:
        for name in ("calibration_ST", "held_out_ST", "evaluation_ST"):
            assert getattr(others, name).equal(getattr(samples, name))
        raise ValueError("data.all: they are the same")

    monkeypatch.setattr("lit_recon.fit.configure.check_samples", compared)
    assert generated().err.strip() == "data.all: they are the same"


@pytest.mark.parametrize(
    ("data", "overrides", "said"),
    [
        ("self_generated", ["data.temperature=0"], "data.temperature=0: give a number above 0"),
        ("self_generated", ["data.temperature=hot"], "data.temperature=hot: expected a number"),
        ("self_generated", ["data.evaluation.paths=[nope.txt]"], "data.evaluation.paths: nope.txt is not there"),
        ("self_generated", ["data.length=65"], "data.length: texts of 65 tokens are beyond the context"),
        ("mixture", ["data.weights.other=-1"], "data.weights.other=-1: give a number, 0 or more"),
        ("mixture", ["data.sources.generated.temperature=-1"], "data.sources.generated.temperature=-1: give a number"),
        ("mixture", ["data.weights={generated: 0, other: 0}"], "all are 0"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    generated: Callable[..., Ended], data: str, overrides: list[str], said: str, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    ended = generated(*overrides, data=data)
    assert ended.status == 2 and ended.err.startswith("data.") and said in ended.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_source_that_is_given_by_name_is_told_how_to_be_given(tiny_run: Callable[..., Ended]) -> None:
    ended = tiny_run("data=self_generated", "data.evaluation=wikitext2")
    assert ended.status == 2
    assert ended.err.strip() == (
        "data.evaluation='wikitext2' is no source of text; choose a member of the group data by "
        "data@data.evaluation=wikitext2"
    )
