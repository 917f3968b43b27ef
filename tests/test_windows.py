"""Partitions cover the model, in order, whatever its depth."""

import pytest
import torch
from conftest import CPU, tiny_model
from transformers import PreTrainedModel

from lit_recon.blocks import Decoder
from lit_recon.windows import partition


@pytest.mark.parametrize("settings", [{"by": "block"}, {"by": "blocks", "size": 2}, {"by": "model"}])
def test_windows_compose_to_the_model(model: PreTrainedModel, tokens_ST: torch.Tensor, settings: dict) -> None:
    decoder = Decoder(model, CPU.device)
    hidden_BTD, calls = decoder.embed(tokens_ST)
    for window in partition(model, **settings):
        hidden_BTD = window(hidden_BTD, calls)
    assert torch.equal(decoder.logits(hidden_BTD), model(tokens_ST, use_cache=False).logits)


@pytest.mark.parametrize(
    ("size", "names"), [(2, ["00_01", "02_03", "block_04"]), (3, ["00_02", "03_04"]), (4, ["00_03", "block_04"])]
)
def test_a_depth_that_the_size_does_not_divide_loses_no_layer(size: int, names: list[str]) -> None:
    windows = partition(tiny_model("llama", num_hidden_layers=5, layer_types=None), by="blocks", size=size)
    assert [index for window in windows for index in window.indices] == [0, 1, 2, 3, 4]
    assert [window.name.removeprefix("blocks_") for window in windows] == names


def test_every_parameter_of_the_layers_is_in_exactly_one_window(model: PreTrainedModel) -> None:
    held = [parameter for window in partition(model) for parameter in window.parameters()]
    layers = [parameter for layer in Decoder(model, CPU.device).layers for parameter in layer.parameters()]
    assert sorted(map(id, held)) == sorted(map(id, layers))


@pytest.mark.parametrize(
    ("settings", "said"), [({"by": "head"}, "block, blocks, model"), ({"by": "blocks", "size": 0}, "at least 1")]
)
def test_an_unknown_kind_or_size_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        partition(tiny_model("llama"), **settings)
