"""A window is in float32 while it is worked on, and returns in the model's own dtype, or as it was."""

from pathlib import Path

import pytest
import torch
from conftest import CPU, letter_tokenizer
from transformers import AutoModelForCausalLM

from lit_recon.fit.output.checkpoint import save_whole
from lit_recon.model.architectures import tiny_model
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import partition


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
    made.offload(first)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(torch.equal(parameter, dense[name]) for name, parameter in model.named_parameters())
    save_whole(tmp_path / "checkpoint", model, letter_tokenizer(), "card")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").dtype == dtype


def test_windows_and_their_matrices_are_stored_in_the_dtypes_of_the_model() -> None:
    model = tiny_model("llama").bfloat16()
    model.model.layers[1].input_layernorm.float()
    made = WeightOffloader(model, CPU.device)
    window = partition(model)[1]
    made.onload(window)
    stored = dict(zip((name for name, _ in window.named_parameters()), made.dtypes(window), strict=True))
    assert stored.pop("layers.0.input_layernorm.weight") == torch.float32
    assert len(stored) == 8 and set(stored.values()) == {torch.bfloat16}
    made.discard()
    matrix = partition(model, by="matrix")[7]
    made.onload(matrix.enclosing)
    matrix.open()
    assert matrix.weight.dtype == torch.float32 and made.dtypes(matrix) == [torch.bfloat16]
    made.discard()


def test_a_window_is_moved_back_in_the_dtype_of_the_model() -> None:
    model = tiny_model("llama").bfloat16()
    made = WeightOffloader(model, CPU.device)
    window = partition(model)[1]
    made.onload(window)
    trained = {}
    for name, parameter in window.named_parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
        trained[name] = parameter.clone()
    made.offload(window)
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
    made.offload(first)
    names = [matrix.name for matrix in first.kept_matrices()]  # those whose masks are kept
    assert len(names) == 7 and all(name.startswith("model.layers.0.") for name in names)
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if name.startswith("model.layers.0.") else dense[name]
        assert torch.equal(parameter, expected), name
