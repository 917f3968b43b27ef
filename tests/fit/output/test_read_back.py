"""The checkpoint that is read back has the dense model's values wherever no window is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ended
from safetensors.torch import load_file, save_file

from lit_recon.fit.output.read_back import check_unchanged
from lit_recon.model.architectures import tiny_model

OUTSIDE = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wpe.weight"}


def changed(folder: Path, name: str) -> None:
    """Flip the last bit of the last number of a tensor."""
    (path,) = (path for path in folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(path)
    tensors[name].view(-1).view(torch.int32)[-1] ^= 1
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_one_bit_of_what_is_in_no_layer_is_noticed_and_layers_may_differ(shape: str, tmp_path: Path) -> None:
    model = tiny_model(shape)
    model.save_pretrained(tmp_path)
    inside = "model.layers.1.mlp.up_proj.weight" if shape == "llama" else "transformer.h.1.mlp.c_fc.weight"
    changed(tmp_path, inside)
    check_unchanged(tmp_path, model)
    changed(tmp_path, OUTSIDE[shape])
    with pytest.raises(RuntimeError, match=f"{OUTSIDE[shape]} is in no window, and differs from the dense model's"):
        check_unchanged(tmp_path, model)


def test_a_run_whose_checkpoint_was_changed_where_its_text_does_not_reach_does_not_end_well(
    tiny_run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(saved: object, *others: object) -> object:
        changed(Path("run/checkpoint"), "model.embed_tokens.weight")  # that of a token that no text has
        return whole(saved, *others)

    from lit_recon.fit import run
    from lit_recon.fit.output.read_back import read_back as whole

    monkeypatch.setattr(run, "read_back", meanwhile)
    with pytest.raises(RuntimeError, match="model.embed_tokens.weight is in no window"):
        tiny_run()
    assert not Path("run/results.json").exists()
