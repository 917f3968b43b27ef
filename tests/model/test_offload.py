"""What is saved is what users read back: exact zeros, equal logits, whole files or none."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import CPU, chain_of, letter_tokenizer
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from lit_recon.evaluate.perplexity import EvaluationProtocol
from lit_recon.fit.output.results import Results
from lit_recon.model.architectures import VOCABULARY, tiny_model
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import partition
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner
from lit_recon.system.atomic_files import replaced_folder


def pruned(model: PreTrainedModel) -> WeightOffloader:
    """A checkpoint over a model of which every window was pruned and written out."""
    made = WeightOffloader(model, CPU.device)
    tokens_ST = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    chain = chain_of(model, tokens_ST, 1)
    pruner = Pruner(Magnitude(), Unstructured(sparsity=0.5), chain)
    for window in partition(model):
        made.onload(window)
        pruner.gather(window)
        masks = pruner.prune(window.matrices())
        chain.advance(window)
        made.take_back(window, masks)
    return made


def test_the_saved_folder_is_read_by_transformers_with_exact_zeros_and_equal_logits(
    model: PreTrainedModel, tokens_ST: Tensor, tmp_path: Path
) -> None:
    made = pruned(model)
    made.save(tmp_path / "checkpoint", letter_tokenizer(), "# card\n")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").eval()
    assert type(read) is type(model)
    for name in made.masks:
        weight, mask = read.get_parameter(name), made.masks[name]
        assert torch.count_nonzero(weight[~mask]) == 0, name
        assert torch.count_nonzero(weight[mask]) == mask.sum() and 0.49 < mask.float().mean() < 0.51, name
    with torch.no_grad():
        assert torch.equal(read(tokens_ST, use_cache=False).logits, model(tokens_ST, use_cache=False).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint")("abc")["input_ids"] == [2, 3, 4]
    assert (tmp_path / "checkpoint" / "README.md").read_text() == "# card\n"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_window_is_float32_in_work_and_in_the_models_own_dtype_before_and_after(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model("llama").to(dtype)
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    made = WeightOffloader(model, CPU.device)
    first, second, _ = partition(model)
    made.onload(first)
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in second.parameters()} == {dtype}
    made.take_back(first, {})
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(torch.equal(parameter, dense[name]) for name, parameter in model.named_parameters())
    made.save(tmp_path / "checkpoint", letter_tokenizer(), "card")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").dtype == dtype


def test_a_rounded_window_computes_with_what_will_be_stored_of_it() -> None:
    model = tiny_model("llama").bfloat16()
    made = WeightOffloader(model, CPU.device)
    window = partition(model)[1]
    made.onload(window)
    trained = {}
    for name, parameter in window.named_parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
        trained[name] = parameter.clone()
    made.round(window)
    for name, parameter in window.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, trained[name].bfloat16().float()) and not torch.equal(parameter, trained[name])
    made.take_back(window, {})
    for name, parameter in window.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, trained[name].bfloat16()), name


def test_layers_that_a_window_does_not_keep_are_written_out_as_they_were_and_without_masks() -> None:
    model = tiny_model("llama")
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    made = WeightOffloader(model, CPU.device)
    first, _ = partition(model, by="blocks", size=2, stride=1)
    made.onload(first)
    for parameter in first.parameters():
        parameter.zero_()
    made.take_back(
        first, {matrix.name: torch.zeros_like(matrix.weight, dtype=torch.bool) for matrix in first.matrices()}
    )
    assert len(made.masks) == 7 and all(name.startswith("model.layers.0.") for name in made.masks)
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if name.startswith("model.layers.0.") else dense[name]
        assert torch.equal(parameter, expected), name


def test_tied_embeddings_stay_tied(tokens_ST: Tensor, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    made = pruned(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    made.save(tmp_path / "checkpoint", letter_tokenizer(), "card")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").eval()
    assert read.config.tie_word_embeddings
    assert read.lm_head.weight is read.model.embed_tokens.weight
    with safe_open(tmp_path / "checkpoint" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  # not a dict
    with torch.no_grad():
        assert torch.equal(read(tokens_ST).logits, model(tokens_ST).logits)


@pytest.mark.parametrize(
    "fails", [(PreTrainedModel, "save_pretrained"), (PreTrainedTokenizerFast, "save_pretrained"), (Path, "write_text")]
)
def test_a_save_that_fails_half_way_leaves_no_checkpoint_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: tuple[type, str]
) -> None:
    made = pruned(tiny_model("llama"))
    whole = getattr(*fails)

    def fail(*arguments: object, **settings: object) -> None:
        whole(*arguments, **settings)  # what it writes is there, when the disk is full
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*fails, fail)
        with pytest.raises(OSError, match="no space left"):
            made.save(tmp_path / "checkpoint", letter_tokenizer(), "card")
        assert not (tmp_path / "checkpoint").exists()
    made.save(tmp_path / "checkpoint", letter_tokenizer(), "card")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def results(seed: int) -> Results:
    return Results(
        perplexity={"dense": 10.0, "pruned": 20.0, "reconstructed": 14.0},
        relative_error={"pruned": 0.3, "reconstructed": 0.1},
        protocol=EvaluationProtocol(
            dataset="d", split="evaluation", context=4, windows=1, tokens=3, precision="32-true"
        ),
        model={"name": "tiny"},
        recipe={"criterion": "Magnitude"},
        sparsity={"total": 0.4, "by_matrix": {}},
        windows=[],
        seconds={"total": 1.0},
        peak_memory_bytes=2,
        walk_peak_memory_bytes=1,
        predicted={"seconds": 1.0, "peak_memory_bytes": 2},
        tokens={"calibration": 4},
        seed=seed,
    )


def test_a_folder_with_folders_in_it_takes_the_place_of_another(tmp_path: Path) -> None:
    """As of tokenizers with several chat templates."""
    for text in ("first", "second"):
        with replaced_folder(tmp_path / "made") as partial:
            (partial / "additional_chat_templates").mkdir(parents=True)
            (partial / "additional_chat_templates" / "tool_use.jinja").write_text(text)
        assert (tmp_path / "made" / "additional_chat_templates" / "tool_use.jinja").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_results_that_could_not_be_written_whole_leave_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    results(seed=1).save(path)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        results(seed=2).save(path)
    found = json.loads(path.read_text())
    assert found["seed"] == 1 and found["gap_recovered"] == pytest.approx(0.6)


def test_a_rename_that_fails_leaves_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError("interrupted")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="interrupted"):
        results(seed=1).save(tmp_path / "results.json")
    assert not (tmp_path / "results.json").exists()
