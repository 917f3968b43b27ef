"""The command on text of users: it may be gone when the run ends, and its tokens must fit the model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ended, letter_tokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_recon.data.files import Files
from lit_recon.fit import run


def model_with(model_folder: Path, folder: Path, *tokens: str, opens: bool = False, eos: bool = False) -> Path:
    """A copy of the tiny model, whose tokenizer has more tokens; all of them open texts, or the last ends them."""
    shutil.copytree(model_folder, folder)
    tokenizer = letter_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    if opens:
        ids = list(zip(tokens, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True))
        template = processors.TemplateProcessing(single=f"{' '.join(tokens)} $A", special_tokens=ids)
        tokenizer.backend_tokenizer.post_processor = template
    if eos:
        tokenizer.eos_token = tokens[-1]
    tokenizer.save_pretrained(folder)
    return folder


def test_text_that_is_removed_during_the_walk_costs_no_result_and_what_opens_it_is_named_and_not_predicted(
    tiny_run: Callable[..., Ended],
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Path(shutil.copy(text_file, tmp_path / "own.txt"))
    walk_over = run._walk_over

    def removed(*arguments: object) -> object:
        own.unlink()
        return walk_over(*arguments)

    monkeypatch.setattr(run, "_walk_over", removed)
    model = model_with(model_folder, tmp_path / "model", "[gMASK]", "<sop>", opens=True)
    ended = tiny_run(f"model.name={model}", "data=files", f"data.paths=[{own}]")
    assert ended.status == 0, ended.err
    assert "own.txt (evaluation), 4 sequences of 32 tokens, each after [gMASK]<sop>, 120 predicted" in " ".join(
        ended.out.split()
    )
    results = json.loads(Path("run/results.json").read_text())
    protocol = results["protocol"]
    assert (protocol["dataset"], protocol["opening"], protocol["tokens"]) == ("own.txt", "[gMASK]<sop>", 4 * 30)
    samples = Files(paths=[str(text_file)], length=32, evaluation_samples=4, evaluation_length=32).samples(
        AutoTokenizer.from_pretrained(model), cache=tmp_path
    )
    labels_ST = samples.evaluation_ST.clone()
    labels_ST[:, :2] = -100
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(model)(samples.evaluation_ST, labels=labels_ST).loss.item()
    assert results["nats"]["dense"] == pytest.approx(dense, rel=0.01)  # the run may have computed in bf16


@pytest.mark.parametrize("part", ["calibration", "evaluation", "end of text"])
def test_tokens_that_the_model_has_no_embedding_for_are_refused_before_anything_is_written(
    tiny_run: Callable[..., Ended], model_folder: Path, text_file: Path, tmp_path: Path, part: str
) -> None:
    extra = [f"<{number}>" for number in range(30)]  # the last is beyond the 64 rows
    model = model_with(model_folder, tmp_path / "model", *extra, eos=part == "end of text")
    text = text_file.read_text()
    for name, within in (("calibration", text), ("evaluation", text.replace("e", "a"))):
        rows = [within[start : start + 20] for start in range(0, len(within), 20)]
        rows = [row.replace("a", extra[-1]) for row in rows] if name == part else rows
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    paths = (f"data.paths=[{tmp_path}/calibration.jsonl]", f"data.evaluation_paths=[{tmp_path}/evaluation.jsonl]")
    before = sorted(tmp_path.rglob("*"))
    ended = tiny_run(f"model.name={model}", "data=files", *paths, "data.packing=documents")
    assert ended.status == 2 and sorted(tmp_path.rglob("*")) == before
    named = "evaluation" if part == "evaluation" else "calibration"
    assert ended.err.startswith(f"the {named} text has the token 76, and the model's embedding 64 rows, 0 to 63: ")
    assert "use the model's own tokenizer" in ended.err


def test_samples_beyond_the_context_that_a_model_was_trained_with_are_said_in_a_line(
    tiny_run: Callable[..., Ended],
) -> None:
    ended = tiny_run("data.evaluation_length=65", "plan=true")
    assert ended.status == 0, ended.err
    said = " ".join(ended.out.split())
    assert said.count("longer than the context that LlamaForCausalLM was trained with, 64 tokens") == 1
    assert "data.evaluation_length=65: " in said and "data.length=32" not in said
