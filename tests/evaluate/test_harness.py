"""Tasks through the real lm-eval, offline: a cloze task of our own, made of the standard library's text."""

import importlib.util
import json
import os
import random
import re
import sys
from functools import partialmethod
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any

import pytest
import torch
from conftest import letter_tokenizer, telling_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.evaluate import harness
from lit_recon.evaluate.harness import LISTS, LoadedTasks, TaskResult, load_tasks, run_tasks, tasks_as_json
from lit_recon.model.architectures import tiny_model

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='lm-eval is not installed: pip install -e ".[eval]"'
)
TASK = """
task: pydoc_cloze
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
Metrics = dict[str, TaskResult]


def cloze(number: int) -> list[dict[str, Any]]:
    """Sentences without their last word, and four words to choose from, of different lengths."""
    draw = random.Random(0)
    sentences = re.findall(
        r"[A-Z][a-z ]{20,60} [a-z]{3,12}\.", " ".join(" ".join(topics.values()).split()).replace("\n", " ")
    )
    split = [sentence[:-1].lower().rsplit(" ", 1) for sentence in draw.sample(sorted(set(sentences)), number)]
    words = sorted({word for _, word in split})
    found = []
    for text, word in split:
        choices = [word, *draw.sample([other for other in words if other != word], 3)]
        draw.shuffle(choices)
        found.append({"text": text, "choices": choices, "answer": choices.index(word)})
    return found


@pytest.fixture(scope="session")
def documents() -> list[dict[str, Any]]:
    return cloze(40)


@pytest.fixture(scope="session")
def tasks_folder(documents: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cloze task, a variant of it that has 0 examples in any case, and one that would run code."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "cloze.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    made = TASK.format(data=data, cache=folder / "cache")
    (folder / "cloze.yaml").write_text(made)
    (folder / "code.yaml").write_text("include: cloze.yaml\ntask: coding\nunsafe_code: true\n")
    (folder / "lost.yaml").write_text(
        made.replace("pydoc_cloze", "lost").replace(str(data), str(folder / "gone.jsonl"))
    )
    return folder


@pytest.fixture(scope="session")
def model_with_context() -> PreTrainedModel:
    """A tiny model into whose context examples fit."""
    return tiny_model("llama", max_position_embeddings=512)


def scored(results: list[TaskResult]) -> Metrics:
    return {result.metric: result for result in results}


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, text: str, choice: str) -> float:
    """Of a choice after a text, in nats."""
    before, whole = (telling_tokenizer()(words)["input_ids"] for words in (text, f"{text} {choice}"))
    logits_TV: Tensor = model(torch.tensor([whole]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(logits_TV[at - 1, whole[at]].item() for at in range(len(before), len(whole)))


@needs_harness
def test_acc_is_the_share_of_questions_whose_answer_is_the_most_likely_and_acc_norm_per_letter(
    model_with_context: PreTrainedModel, tasks_folder: Path, documents: list[dict[str, Any]]
) -> None:
    right, by_length = [], []
    for document in documents:
        choices = document["choices"]
        nats = [log_likelihood(model_with_context, document["text"], choice) for choice in choices]
        right.append(nats.index(max(nats)) == document["answer"])
        per_letter = [one / len(choice) for one, choice in zip(nats, choices, strict=True)]
        by_length.append(per_letter.index(max(per_letter)) == document["answer"])
    tasks = load_tasks(["pydoc_cloze"], tasks_path=tasks_folder)
    before = {name: tensor.clone() for name, tensor in model_with_context.state_dict().items()}
    tokenizer = telling_tokenizer()
    found = scored(run_tasks(model_with_context, tokenizer, tasks, batch_size=4))
    assert set(found) == {"acc", "acc_norm"} and fmean(right) != fmean(by_length)
    assert found["acc"].value == pytest.approx(fmean(right)) and found["acc_norm"].value == pytest.approx(
        fmean(by_length)
    )
    share = fmean(right)
    assert found["acc"].stderr == pytest.approx((share * (1 - share) / 39) ** 0.5)
    assert (found["acc"].task, found["acc"].samples, found["acc"].fewshot) == ("pydoc_cloze", 40, 0)
    assert tokenizer.pad_token is None, "the caller's tokenizer is left as it was"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model_with_context.state_dict().items())


@needs_harness
@pytest.mark.parametrize("fewshot", [None, 2])
def test_results_are_those_of_the_command_of_lm_eval_on_the_same_checkpoint(
    model_with_context: PreTrainedModel,
    tasks_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fewshot: int | None,
) -> None:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import TaskManager

    model_with_context.save_pretrained(tmp_path / "model")
    telling_tokenizer().save_pretrained(tmp_path / "model")
    without_its_own = partialmethod(TaskManager.__init__, include_defaults=False)  # 14,000, which take a minute
    monkeypatch.setattr(TaskManager, "__init__", without_its_own)
    arguments = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}", "--device", "cpu"]
    arguments += ["--tasks", "pydoc_cloze", "--include_path", str(tasks_folder), "--batch_size", "4"]
    arguments += ["--output_path", str(tmp_path / "said.json")]
    arguments += [] if fewshot is None else ["--num_fewshot", str(fewshot)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    cli_evaluate()
    said = json.loads(next(tmp_path.glob("said*.json")).read_text())
    monkeypatch.undo()
    tasks = load_tasks(["pydoc_cloze"], tasks_path=tasks_folder, fewshot=fewshot)
    found = scored(run_tasks(model_with_context, telling_tokenizer(), tasks, batch_size=4))
    row = said["results"]["pydoc_cloze"]
    for metric in ("acc", "acc_norm"):
        assert (found[metric].value, found[metric].stderr) == (row[f"{metric},none"], row[f"{metric}_stderr,none"])
        assert found[metric].fewshot == said["n-shot"]["pydoc_cloze"] == (fewshot or 0)
        assert found[metric].samples == said["n-samples"]["pydoc_cloze"]["effective"]


@needs_harness
def test_the_lists_name_tasks_of_lm_eval_without_examples_and_without_code_but_for_reasoning() -> None:
    from lm_eval import tasks
    from lm_eval.tasks import TaskManager

    folder = Path(tasks.__file__).parent
    parts = ["super_glue", "glue", "hellaswag", "winogrande", "arc", "openbookqa", "gsm8k", "humaneval"]
    index = TaskManager(include_path=[str(folder / part) for part in parts], include_defaults=False).task_index
    for name in LISTS["paper"]:
        assert not index[name].cfg.get("num_fewshot") and not index[name].cfg.get("unsafe_code")
        assert index[name].cfg["output_type"] == "multiple_choice"
    assert index["gsm8k"].cfg["num_fewshot"] == 5 and index["humaneval"].cfg["unsafe_code"]


@needs_harness
@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["coding"], {}, "coding would run code that the model writes.*give unsafe_code=true"),
        (["lost"], {}, "tasks: lost cannot be loaded: .*gone.jsonl.*tasks_path"),
        (["pydoc_cloze"], {"fewshot": -1}, "fewshot=-1: expected"),
        ([], {}, "none is given"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_model_is_there(
    tasks_folder: Path, names: list[str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_tasks(names, tasks_path=tasks_folder, **settings)


@needs_harness
def test_code_runs_with_the_users_word_and_the_process_forgets_it(
    tasks_folder: Path, model_with_context: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(harness.CODE_ALLOWED, raising=False)
    tasks = load_tasks(["coding"], tasks_path=tasks_folder, unsafe_code=True)
    assert scored(run_tasks(model_with_context, telling_tokenizer(), tasks, batch_size=8))["acc"].samples == 40
    assert harness.CODE_ALLOWED not in os.environ


@needs_harness
def test_a_tokenizer_without_a_start_and_an_end_is_refused_in_words(model_with_context: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="no token that starts or ends a text"):
        run_tasks(model_with_context, letter_tokenizer(), LoadedTasks(("a",), [], None))


def test_names_that_are_no_tasks_are_told_together_with_what_they_may_mean() -> None:
    entry = type("Entry", (), {"cfg": None})
    coding = type("Entry", (), {"cfg": {"unsafe_code": True}})
    with pytest.raises(
        ValueError, match=r"no task 'helaswag'; did you mean hellaswag\?; .*no task 'xyz'; humaneval would"
    ):
        harness._check_names(["helaswag", "xyz", "humaneval"], {"hellaswag": entry, "humaneval": coding}, False)
    harness._check_names(["humaneval"], {"humaneval": coding}, True)


def test_without_lm_eval_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'not installed: pip install "lit-recon\[eval\]"'):
        load_tasks(["paper"])


def test_a_folder_without_tasks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="expected a folder with tasks"):
        load_tasks(["paper"], tasks_path=tmp_path)


def result(task: str, metric: str, state: str, value: float) -> TaskResult:
    return TaskResult(task, metric, state, value, 0.01, 10, 0)


def test_the_mean_is_that_of_acc_over_the_tasks_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "version", lambda name: "0.4.13")
    tasks = LoadedTasks(("a", "group"), [], None)
    results = [result("a", "acc", "checkpoint", 0.4), result("a", "acc_norm", "checkpoint", 0.9)]
    results += [result("group", "acc", "checkpoint", 0.6), result("in_group", "acc", "checkpoint", 0.1)]
    results += [result("a", "acc", "dense", 0.5), result("group", "exact_match,strict", "dense", 0.7)]
    said = tasks_as_json(results, tasks)
    assert said["mean"] == {"checkpoint": pytest.approx(0.5), "dense": None}
    assert said["harness"] == "0.4.13" and len(said["results"]) == 6
    assert said["results"][0] == {
        **{"task": "a", "metric": "acc", "state": "checkpoint", "value": 0.4},
        **{"stderr": 0.01, "samples": 10, "fewshot": 0},
    }


def test_filters_of_answers_and_groups_are_told_apart_and_what_is_no_number_is_none() -> None:
    found = {
        "results": {
            "gsm8k": {
                **{"alias": "gsm8k", "sample_len": 9, "exact_match,strict-match": 0.25},
                **{"exact_match_stderr,strict-match": "N/A", "exact_match,flexible-extract": 0.5},
            }
        },
        "groups": {"mmlu": {"alias": "mmlu", "sample_len": 90, "acc,none": 0.3, "acc_stderr,none": 0.02}},
        "n-shot": {"gsm8k": 5},
    }
    assert harness._results(found, "dense") == [
        TaskResult("gsm8k", "exact_match,strict-match", "dense", 0.25, None, 9, 5),
        TaskResult("gsm8k", "exact_match,flexible-extract", "dense", 0.5, None, 9, 5),
        TaskResult("mmlu", "acc", "dense", 0.3, 0.02, 90, None),
    ]
