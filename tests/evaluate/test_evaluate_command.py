"""The command lit_recon.evaluate on runs, folders and nonsense: its numbers, record, and refusals in one message."""

import importlib.util
import json
import random
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Ended, letter_tokenizer, telling_tokenizer
from packaging.version import Version
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_recon import Files, load
from lit_recon.evaluate import __main__ as evaluate
from lit_recon.model.architectures import tiny_model

Evaluate = Callable[..., Ended]


@pytest.fixture
def run_evaluation(
    command: Callable[..., Ended], text_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Evaluate:
    """`python -m lit_recon.evaluate` with these arguments and a few windows of a text, in the working directory."""

    def run(*arguments: str) -> Ended:
        own = ["data=files", f"data.paths=[{text_file}]", "data.evaluation_samples=4", "data.evaluation_length=32"]
        own += ["trainer.precision=32-true", "trainer.accelerator=cpu"]
        given = {word.partition("=")[0].lstrip("+") for word in arguments}
        given |= {"data.paths"} if "data" in given else set()
        kept = [word for word in own if word.partition("=")[0] not in given]
        monkeypatch.setattr(sys, "argv", ["evaluate", *kept, *arguments])
        capfd.readouterr()
        try:
            evaluate.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return Ended(status, *capfd.readouterr())

    return run


def entries(path: str) -> list[dict]:
    """The evaluations in a record."""
    content = json.loads(Path(path).read_text())
    assert content["version"] == 1
    return content["evaluations"]


@pytest.mark.parametrize(
    ("words", "states"),
    [
        (("criterion=ria",), ["dense", "pruned", "checkpoint"]),
        (("criterion=ria", "criterion.permute=true", "pattern=n_m"), ["dense", "checkpoint"]),
        (("criterion=sparsegpt",), ["dense", "checkpoint"]),
    ],
    ids=["as they were", "in another order", "others"],
)
def test_the_pruned_model_is_made_of_masks_where_the_criterion_left_weights_as_they_were(
    run_once: Callable[..., Ended], run_evaluation: Evaluate, words: tuple[str, ...], states: list[str]
) -> None:
    run_once("trainer.precision=32-true", *words)
    assert run_evaluation("checkpoint=run").status == 0
    (found,), results = entries("run/evaluations.json"), json.loads(Path("run/results.json").read_text())
    nats = found["perplexity"]["nats"]
    assert list(nats) == states
    assert "pruned" not in states or nats["pruned"] == pytest.approx(results["nats"]["pruned"], rel=1e-6)


def test_of_a_run_dense_and_pruned_and_checkpoint_are_what_the_run_has_measured(
    run_once: Callable[..., Ended], run_evaluation: Evaluate
) -> None:
    run_once("trainer.precision=32-true")
    ended = run_evaluation("checkpoint=run")
    assert ended.status == 0, ended.err
    (found,), results = entries("run/evaluations.json"), json.loads(Path("run/results.json").read_text())
    nats, expected = found["perplexity"]["nats"], results["nats"]
    assert nats == pytest.approx(
        {"dense": expected["dense"], "pruned": expected["pruned"], "checkpoint": expected["reconstructed"]}, rel=1e-6
    )
    assert found["perplexity"]["gap_recovered"] == pytest.approx(results["gap_recovered"], rel=1e-4)
    assert found["perplexity"]["protocol"] == results["protocol"]
    assert found["agreement"]["hidden"][-1]["mean"] == pytest.approx(
        results["relative_error"]["reconstructed"], rel=0.5
    )
    assert found["agreement"]["kl"] > 0 and 0 < found["agreement"]["top1"] < 1
    assert found["checkpoint"] == "run" and found["dense"] == results["model"]["name"]
    assert found["settings"]["data"]["evaluation_samples"] == 4 and found["versions"]["torch"]
    for said in ("perplexity dense", "perplexity pruned", "gap recovered", "KL divergence", "run/evaluations.json"):
        assert said in ended.out


def test_a_second_evaluation_is_added_and_the_first_stays(
    run_once: Callable[..., Ended], run_evaluation: Evaluate
) -> None:
    run_once("trainer.precision=32-true")
    assert run_evaluation("checkpoint=run", "agreement=false").status == 0
    first = entries("run/evaluations.json")
    assert run_evaluation("checkpoint=run/checkpoint", "data.stride=16", "dense=run/checkpoint").status == 0
    both = entries("run/evaluations.json")
    assert both[:1] == first and len(both) == 2 and first[0]["agreement"] is None
    assert both[1]["agreement"]["kl"] == 0 and both[1]["perplexity"]["protocol"]["stride"] == 16


def test_a_checkpoint_that_save_pretrained_has_written_is_evaluated_by_itself(
    run_evaluation: Evaluate, tmp_path: Path
) -> None:
    tiny_model("gpt_neox").save_pretrained("theirs")
    letter_tokenizer().save_pretrained("theirs")
    ended = run_evaluation("checkpoint=theirs", "data.evaluation_length=null", "data.evaluation_samples=1")
    assert ended.status == 0, ended.err
    (found,) = entries("theirs/evaluations.json")
    assert list(found["perplexity"]["nats"]) == ["checkpoint"] and found["dense"] is None
    assert found["agreement"] is None and found["perplexity"]["gap_recovered"] is None
    context = AutoModelForCausalLM.from_pretrained("theirs").config.max_position_embeddings
    assert found["perplexity"]["protocol"]["context"] == min(4096, context), "the model's own context"


WIKI = ["data=wikitext2", "data.name=wiki", "data.evaluation.name=wiki", "data.config=null"]
WIKI += ["data.evaluation.config=null", "data.evaluation_samples=null"]


@pytest.mark.parametrize("opened", [True, False], ids=["with BOS", "without"])
def test_wikitext2_is_measured_as_the_code_of_pruning_papers_does(run_evaluation: Evaluate, opened: bool) -> None:
    lines = ["", " = a title = \n", "", " first line of it , and more \n", " second\n", ""] * 9
    Path("wiki").mkdir()
    for split in ("train", "test"):
        Path(f"wiki/{split}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tokenizer = telling_tokenizer()
    if opened:
        single = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = single
    model = tiny_model("llama")
    model.save_pretrained("theirs")
    tokenizer.save_pretrained("theirs")
    tokens_1T = AutoTokenizer.from_pretrained("theirs")("\n\n".join(lines), return_tensors="pt").input_ids
    assert (tokens_1T[0, 0] == tokenizer.bos_token_id) == opened
    losses = []
    for start in range(0, tokens_1T.shape[1] - 31, 32):  # eval_ppl_wikitext of locuslab/wanda
        with torch.no_grad():
            logits_1TV = model(tokens_1T[:, start : start + 32], use_cache=False).logits
        targets_T = tokens_1T[0, start + 1 : start + 32]
        losses.append(torch.nn.functional.cross_entropy(logits_1TV[0, :-1], targets_T).item())
    words = ["checkpoint=theirs", *WIKI]
    assert run_evaluation(*words).status == 0
    (found,) = entries("theirs/evaluations.json")
    protocol = found["perplexity"]["protocol"]
    assert found["perplexity"]["nats"]["checkpoint"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert (protocol["windows"], protocol["opening_at"], protocol["split"]) == (len(losses), "text", "test")
    assert protocol["opening"] == ("<s>" if opened else "none") and protocol["dataset"] == "wiki test"
    assert run_evaluation(*words, "opening_at=window", "record=other.json").status == 0
    (other,) = entries("other.json")
    assert other["perplexity"]["protocol"]["opening_at"] == "window"
    assert (other["perplexity"]["nats"] == found["perplexity"]["nats"]) == (not opened)


def test_a_record_can_be_elsewhere(run_evaluation: Evaluate, model_folder: Path) -> None:
    assert run_evaluation(f"checkpoint={model_folder}", "record=mine/record.json").status == 0
    assert len(entries("mine/record.json")) == 1 and not (model_folder / "evaluations.json").exists()


def test_a_run_whose_dense_model_is_gone_is_evaluated_without_it(
    run_once: Callable[..., Ended], run_evaluation: Evaluate
) -> None:
    run_once("trainer.precision=32-true")
    config = Path("run/config.yaml")
    lines = config.read_text().splitlines()
    config.write_text("\n".join("  name: /no/where" if line.startswith("  name: /") else line for line in lines))
    ended = run_evaluation("checkpoint=run")
    assert ended.status == 0, ended.err
    assert "is left out" in ended.out and "dense=<model>" in ended.out
    assert list(entries("run/evaluations.json")[0]["perplexity"]["nats"]) == ["checkpoint"]


def test_all_states_continue_the_same_prompts_and_the_record_and_the_terminal_have_the_texts(
    run_once: Callable[..., Ended], run_evaluation: Evaluate
) -> None:
    run_once("trainer.precision=32-true")
    words = ["perplexity=false", "agreement=false", "prompts=[the old,a new]", "max_new_tokens=12", "batch_size=1"]
    ended = run_evaluation("checkpoint=run", *words)
    assert ended.status == 0, ended.err
    (found,) = entries("run/evaluations.json")
    assert found["perplexity"] is None and found["agreement"] is None and "measure" not in found["seconds"]
    assert [one["prompt"] for one in found["continuations"]] == ["the old", "a new"]
    tokenizer, texts = AutoTokenizer.from_pretrained("run/checkpoint"), found["continuations"][0]["texts"]
    assert list(texts) == ["dense", "pruned", "checkpoint"]
    for state, folder in (("dense", found["dense"]), ("checkpoint", "run/checkpoint")):
        model, tokens_1T = (
            AutoModelForCausalLM.from_pretrained(folder),
            tokenizer("the old", return_tensors="pt").input_ids,
        )
        for _ in range(12):  # greedily
            with torch.no_grad():
                next_11 = model(tokens_1T, use_cache=False).logits[:, -1:].argmax(-1)
            tokens_1T = torch.cat([tokens_1T, next_11], 1)
        assert texts[state] == tokenizer.decode(tokens_1T[0, -12:])
    assert texts["dense"] in ended.out
    lines = re.findall(r"^(\d+)% prompts, (\w+), .* left", ended.out, re.MULTILINE)
    assert len(lines) == 10 and lines[-1][0] == "100", "tenths of 72 tokens: 12 of 2 prompts in 3 states"
    assert list(dict.fromkeys(state for _, state in lines)) == list(texts)


def test_drift_of_every_matrix_is_in_the_record(run_once: Callable[..., Ended], run_evaluation: Evaluate) -> None:
    run_once("trainer.precision=32-true")
    ended = run_evaluation("checkpoint=run", "perplexity=false", "agreement=false", "drift=true")
    assert ended.status == 0, ended.err
    (found,) = entries("run/evaluations.json")
    pruned = json.loads(Path("run/results.json").read_text())["sparsity"]["by_matrix"]
    assert [one["matrix"] for one in found["drift"]] == list(pruned) and found["drift"][0]["kind"] == "self_attn.q_proj"
    first = found["drift"][0]
    assert first["accumulated"] == pytest.approx(first["local"], rel=0.1), "only a norm before it has changed"
    assert all(0 < one["local"]["mean"] <= one["local"]["max"] for one in found["drift"])


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='lm-eval is not installed: pip install -e ".[eval]"'
)
def test_tasks_are_run_on_the_checkpoint_and_on_the_dense_model(run_evaluation: Evaluate, tmp_path: Path) -> None:
    for name, seed in (("dense", 0), ("theirs", 1)):
        torch.manual_seed(seed)
        model = tiny_model("llama", max_position_embeddings=512)
        model.lm_head.weight.normal_()
        model.save_pretrained(name)
        telling_tokenizer().save_pretrained(name)
    Path("tasks").mkdir()
    rows = [{"text": "a b c", "choices": ["d", "e"], "answer": 0}, {"text": "x y", "choices": ["a", "z"], "answer": 1}]
    Path("tasks/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("tasks/letters.yaml").write_text(
        f"task: letters\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/tasks/rows.jsonl}}, cache_dir: {tmp_path}/cache}}\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    words = ["perplexity=false", "agreement=false", "tasks=letters", "tasks_path=tasks"]
    ended = run_evaluation("checkpoint=theirs", "dense=dense", *words)
    assert ended.status == 0, ended.err
    tasks = entries("theirs/evaluations.json")[0]["tasks"]
    assert [(one["task"], one["metric"], one["state"], one["samples"]) for one in tasks["results"]] == [
        ("letters", "acc", state, 2) for state in ("checkpoint", "dense")
    ]
    assert tasks["mean"].keys() == {"checkpoint", "dense"} and "letters acc" in ended.out
    lines = re.findall(r"^(\d+)% tasks, (\w+), .* left", ended.out, re.MULTILINE)
    assert lines == [(str(100 * n // 8), "checkpoint" if n <= 4 else "dense") for n in range(1, 9)]
    assert "Running loglikelihood" not in ended.err, "not a bar of lm-eval's own as well"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["checkpoint=./nowhere"], "checkpoint=./nowhere: no such folder here; give the folder of a run"),
        (["checkpoint=nowhere"], "checkpoint=nowhere: no such folder here"),
        (["checkpoint=empty"], "neither a model (no config.json) nor a run (no checkpoint/); it holds nothing"),
        (["checkpoint=begun"], "checkpoint=begun: that run has no checkpoint/ yet"),
        (["checkpoint=text.txt"], "checkpoint=text.txt is a file"),
        (["checkpoint={model}", "dense=other"], "dense=other: it has 32 tokens and the checkpoint 64"),
        (
            ["checkpoint={model}", "data.evaluation_samples=100000"],
            "asked for are 100000; lower data.",
        ),
        (["checkpoint={model}", "data.stride=33"], "data.stride=33: expected a whole number from 1 to 32"),
        (["checkpoint={model}", "data.stride=many"], "data.stride=many: expected a whole number or null"),
        (["checkpoint={model}", "opening_at=never"], "opening_at='never': choose one of window, text"),
        (["checkpoint={model}", "memory_limit=much"], "memory_limit=much: expected a size"),
        (["checkpoint={model}", "memory_limit=1MB"], "memory_limit=1.00 MB: one window of 32 tokens in 1 states needs"),
        (["checkpoint={model}", "trainer.precision=8-true"], "trainer.precision='8-true': expected one of auto"),
        (["checkpoint={model}", "record=text.txt"], "text.txt is no record of evaluations"),
        (["checkpoint={model}", "perplexity=false", "agreement=false"], "nothing is left to evaluate"),
        (
            ["checkpoint={model}", "drift=true"],
            "drift=true: it is that of the dense model's outputs; give",
        ),
        (["checkpoint={model}", "prompts=['']"], "prompt '' has no tokens"),
        (["checkpoint={model}", "prompts=own", "max_new_tokens=0"], "max_new_tokens=0"),
        (["checkpoint={model}", "prompts=own", "chat=true"], "the tokenizer has no chat template"),
        (["checkpoint={model}", "perplexity=much"], "perplexity=much: expected true or false"),
        (["checkpoint={model}", "data.paths=[no.txt]"], "no.txt"),
        (["checkpoint={model}", "chekpoint=a"], "chekpoint: unknown setting; the top level has agreement, batch_size"),
        (["checkpoint={model}", "data=nope"], "data=nope: unknown; choose one of"),
        ([], "checkpoint: has no value; give checkpoint=<value>"),
        (["run"], "run: expected <setting>=<value>, such as checkpoint=runs/first"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_message_with_status_2_before_anything_is_written(
    run_evaluation: Evaluate, model_folder: Path, words: list[str], said: str
) -> None:
    Path("empty").mkdir()
    Path("begun").mkdir()
    Path("begun/config.yaml").write_text("seed: 0\n")
    Path("text.txt").write_text("words")
    if "dense=other" in words:
        other = tiny_model("llama")
        other.resize_token_embeddings(32)
        other.save_pretrained("other")
        letter_tokenizer().save_pretrained("other")
    before = sorted(Path().rglob("*"))
    ended = run_evaluation(*(word.format(model=model_folder) for word in words))
    assert ended.status == 2 and said in ended.err, ended.err
    assert "Traceback" not in ended.err and len(ended.err.splitlines()) == 1
    assert sorted(Path().rglob("*")) == before and not (model_folder / "evaluations.json").exists()


def test_a_result_that_cannot_be_written_is_shown(
    run_evaluation: Evaluate, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lit_recon.evaluate.run.add", full)
    ended = run_evaluation(f"checkpoint={model_folder}", "record=record.json")
    assert ended.status == 1 and "perplexity checkpoint" in ended.out
    assert ended.err == "record.json: the numbers above could not be added (No space left on device).\n"


@pytest.mark.slow
def test_several_checkpoints_are_evaluated_one_after_the_other(run_evaluation: Evaluate, model_folder: Path) -> None:
    ended = run_evaluation(f"checkpoint={model_folder},./nowhere", "record=record.json", "-m")
    assert ended.status == 1 and ended.err.endswith("1 of 2 runs failed: checkpoint=./nowhere\n"), ended.err
    assert len(entries("record.json")) == 1


def test_all_problems_are_told_at_once(run_evaluation: Evaluate) -> None:
    ended = run_evaluation("checkpoint=./a", "dense=./b", "memory_limit=much", "trainer.precision=8-true")
    assert ended.status == 2 and len(ended.err.splitlines()) == 4, ended.err


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="this transformers is refused for the GGUF file"
)
@pytest.mark.parametrize("stride", [None, 160])
def test_perplexity_of_smollm2_is_that_of_transformers_loss_on_the_same_windows(
    run_evaluation: Evaluate, text_file: Path, monkeypatch: pytest.MonkeyPatch, stride: int | None
) -> None:
    monkeypatch.delenv("LIT_RECON_CACHE")  # the user's own cache, where the model is
    length, number = 256, 3
    words = [f"data.evaluation_samples={number}", f"data.evaluation_length={length}", f"data.stride={stride or 'null'}"]
    ended = run_evaluation("checkpoint=smollm2", "record=record.json", *words)
    assert ended.status == 0, ended.err
    model, tokenizer = load("smollm2")
    tokens_1T = Files(paths=[str(text_file)]).evaluation_stream(tokenizer)[None]
    total, tokens, last = 0.0, 0, 0
    for begin in range(0, number * (stride or length), stride or length):
        labels_1T = tokens_1T[:, begin : begin + length].clone()
        given = max(1, last - begin)
        labels_1T[:, :given] = -100
        with torch.no_grad():
            loss = model(tokens_1T[:, begin : begin + length], labels=labels_1T, use_cache=False).loss.double().item()
        total, tokens, last = total + loss * (length - given), tokens + length - given, begin + length
    (found,) = entries("record.json")
    assert found["perplexity"]["nats"]["checkpoint"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["perplexity"]["protocol"]["tokens"] == tokens


VALUES = "0 1 -1 0.5 nan 1e30 true null abc '' ??? ~/x ~nobody/x . / [] [1,2] [a=b] {} {a:1} a=b a,b 1,2 a(b été [ \\"
SETTINGS = """
    checkpoint dense perplexity agreement drift tasks tasks_path fewshot unsafe_code prompts max_new_tokens temperature
    chat seed batch_size opening_at record memory_limit nope data.paths data.bos data.evaluation_samples data.stride
    data.nope data.evaluation_length data.batch_size trainer.precision trainer.devices trainer._target_ trainer"""


def test_every_command_line_is_carried_out_or_refused_in_words_that_name_a_setting(
    run_evaluation: Evaluate, model_folder: Path
) -> None:
    draw, found = random.Random(20261128), []
    for _ in range(40):
        name = draw.choice(SETTINGS.split())
        word = draw.choice((f"{name}={draw.choice((*VALUES.split(), '${seed}', '${nope}'))}",) * 9 + (f"~{name}",))
        others = [] if word.startswith("checkpoint=") else [f"checkpoint={model_folder}"]
        others += [] if word.startswith("record=") else ["record=record.json"]
        ended = run_evaluation(*others, word)
        told = name in ended.err or word.partition("=")[2] in ended.err
        if ended.status not in (0, 2) or "Traceback" in ended.err + ended.out or (ended.status == 2 and not told):
            found.append((word, ended.status, ended.err[-1000:]))
    assert found == []


def test_the_readmes_evaluations_compose(run_evaluation: Evaluate) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m lit_recon\.evaluate (.+)", readme, re.MULTILINE)
    assert len(commands) >= 3
    for line in commands:
        words = [word for word in shlex.split(line) if not word.startswith("data=")]
        ended = run_evaluation(*words, "--cfg", "job")
        assert ended.status == 0, f"{line}: {ended.err}"
