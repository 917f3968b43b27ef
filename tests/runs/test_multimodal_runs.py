"""Runs on models that also see: their decoder is pruned, and all else of them is in the checkpoint as it was."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import letter_tokenizer, unmappable
from launcher import Ended
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

sys.path.append(str(Path(__file__).parents[1] / "model"))
from multimodal import MULTIMODAL, tiny_multimodal

LEFT_OUT = {"mtp.fc.weight": torch.ones(3, 2), "surplus.weight": torch.ones(2)}
COMPANIONS = {"LICENSE": "as it is", "preprocessor_config.json": '{"do_resize": true}'}


def saved(kind: str, folder: Path) -> Path:
    """A model with tensors that transformers leaves out, and with files beside its weights."""
    tiny_multimodal(kind).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | LEFT_OUT, weights, {"format": "pt"})
    for name, content in COMPANIONS.items():
        (folder / name).write_text(content)
    return folder


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors in its files."""
    return {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("route", ["streamed", "in memory"])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "qwen3_5" else pytest.mark.slow) for kind in MULTIMODAL]
)
def test_the_decoder_is_pruned_and_all_else_is_in_the_checkpoint_as_it_was(
    tiny_run: Callable[..., Ended], tmp_path: Path, kind: str, route: str
) -> None:
    source = saved(kind, tmp_path / "source")
    given = source if route == "streamed" else unmappable(source, tmp_path / "unmappable")
    ended = tiny_run("model=hf", f"model.name={given}", "allow_unscored=true", "data.num_samples=4")
    assert ended.status == 0, ended.err
    said = " ".join(ended.out.split())
    assert ("in memory as a whole" in said) == (route == "in memory")
    assert "LOAD REPORT" not in said + ended.err
    assert said.count("transformers leaves out 2 tensors of the model's files (mtp.fc.weight, surplus.weight)") == 1
    checkpoint = tmp_path / "run" / "checkpoint"
    model, info = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    dense = dict(tiny_multimodal(kind).named_parameters())
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, dense[name])}
    assert len(changed) > 10
    assert not [name for name in changed if "vision" in name or "visual" in name or ".layers." not in name]
    stored = tensors_of(checkpoint)
    for name, tensor in LEFT_OUT.items():
        assert torch.equal(stored[name], tensor)
    for name, content in COMPANIONS.items():
        assert (checkpoint / name).read_text() == content
    assert "AutoModelForMultimodalLM.from_pretrained" in (checkpoint / "README.md").read_text()
