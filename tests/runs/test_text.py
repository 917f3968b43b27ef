"""The command on text of users: it may be gone when the run ends, and its tokens must fit the model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, letter_tokenizer
from tokenizers import processors

from lit_recon.fit import run


def model_with(model_folder: Path, folder: Path, *tokens: str, opens: bool = False, eos: bool = False) -> Path:
    """A copy of the tiny model, whose tokenizer has more tokens; the last one opens texts, or ends them."""
    shutil.copytree(model_folder, folder)
    tokenizer = letter_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    if opens:
        last = tokens[-1], tokenizer.convert_tokens_to_ids(tokens[-1])
        template = processors.TemplateProcessing(single=f"{tokens[-1]} $A", special_tokens=[last])
        tokenizer.backend_tokenizer.post_processor = template
    if eos:
        tokenizer.eos_token = tokens[-1]
    tokenizer.save_pretrained(folder)
    return folder


def test_text_that_is_removed_during_the_walk_costs_no_result_and_the_protocol_names_what_opened_it(
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
    model = model_with(model_folder, tmp_path / "model", "<s>", opens=True)
    ended = tiny_run(f"model.name={model}", "data=files", f"data.paths=[{own}]")
    assert ended.status == 0, ended.err
    assert "own.txt (evaluation), 4 sequences of 32 tokens, each after <s>," in " ".join(ended.out.split())
    protocol = json.loads(Path("run/results.json").read_text())["protocol"]
    assert (protocol["dataset"], protocol["opening"]) == ("own.txt", "<s>")


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
