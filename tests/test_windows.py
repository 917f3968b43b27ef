"""Partitions cover the model, in order, whatever its depth and its layers' shape."""

import pytest
import torch

from lit_recon.architectures import COMPOSED, SHAPES, compose, support, tiny_model
from lit_recon.blocks import Decoder, call_layer
from lit_recon.partition import layer_windows, partition

REFUSED = {"bloom", "opt_post_norm"}  # their halves


@pytest.fixture
def tokens_BT() -> torch.Tensor:
    """Longer than the tiny sliding windows."""
    return torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_replaying_the_recorded_calls_equals_the_models_own_forward(
    shape: str, batch_size: int, tokens_BT: torch.Tensor
) -> None:
    model, tokens_BT = tiny_model(shape), tokens_BT[:batch_size]
    decoder = Decoder(model, torch.device("cpu"))
    hidden_BTD, calls = decoder.embed(tokens_BT)
    for layer, call in zip(decoder.layers, calls, strict=True):
        hidden_BTD = call_layer(layer, hidden_BTD, call)
    assert torch.equal(decoder.logits(hidden_BTD), model(tokens_BT, use_cache=False).logits)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings", [{"by": "half"}, {"by": "block"}, {"by": "blocks", "size": 2, "stride": 1}, {"by": "model"}], ids=str
)
def test_windows_compose_to_the_model(shape: str, settings: dict, tokens_BT: torch.Tensor) -> None:
    model = tiny_model(shape)
    if settings["by"] == "half" and shape in REFUSED:
        with pytest.raises(ValueError, match="use windows=block"):
            partition(model, **settings)
        return
    expected_BTV = model(tokens_BT, use_cache=False).logits
    assert (compose(model, tokens_BT, **settings) - expected_BTV).abs().max() <= COMPOSED * expected_BTV.abs().max()


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - REFUSED))
def test_every_parameter_of_the_layers_is_trained_in_exactly_one_half(shape: str) -> None:
    model = tiny_model(shape)
    held = [id(parameter) for window in layer_windows(model, by="half") for parameter in window.trained()]
    layers = Decoder(model, torch.device("cpu")).layers
    assert sorted(held) == sorted(id(parameter) for layer in layers for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"size": 2}, ["blocks_00_01", "blocks_02_03", "block_04"]),
        ({"size": 3}, ["blocks_00_02", "blocks_03_04"]),
        ({"size": 4}, ["blocks_00_03", "block_04"]),
        ({"size": 3, "stride": 2}, ["blocks_00_02", "blocks_02_04"]),
    ],
    ids=str,
)
def test_a_depth_that_the_size_does_not_divide_keeps_every_layer_once(settings: dict, names: list[str]) -> None:
    windows = layer_windows(tiny_model("llama", num_hidden_layers=5), by="blocks", **settings)
    assert [index for window in windows for index in window.indices[: window.kept]] == [0, 1, 2, 3, 4]
    assert [window.name for window in windows] == names


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"by": "head"}, "matrix, half, block, blocks, model"),
        ({"by": "blocks", "size": 0}, "at least 1"),
        ({"by": "blocks", "size": 2, "stride": 3}, "1 to windows.size=2"),
        ({"by": "blocks", "size": 9}, "has 3 layers"),
        ({"by": "matrix", "head": True}, "no logits"),
    ],
    ids=str,
)
def test_an_unknown_kind_size_or_stride_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        partition(tiny_model("llama"), **settings)


def test_the_support_row_of_a_mixture_says_that_its_routers_stay_dense() -> None:
    row = support("mixtral")
    assert (row["halves"], row["matrix"], row["half"], row["remarks"]) == (
        "sequential",
        "yes",
        "yes",
        "routers stay dense",
    )
