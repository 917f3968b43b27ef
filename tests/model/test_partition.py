"""Partitions cover the model, in order, whatever its depth and its layers' shape."""

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import EVERY_SHAPE, model_of
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lit_recon.model.architectures import compose, tiny_model
from lit_recon.model.decoder import Decoder, call_layer
from lit_recon.model.head import Head
from lit_recon.model.partition import Partition, layer_windows, partition
from lit_recon.model.windows import Window

REFUSED = {"bloom", "mpt", "opt_post_norm", "minimax", "gemma4_moe"}  # their halves
RELATIVE = 1e-5
KINDS = (
    {"by": "half"},
    {"by": "block"},
    {"by": "blocks", "size": 2},
    {"by": "blocks", "size": 3, "stride": 2},
    {"by": "blocks", "size": 2, "stride": 1},
    {"by": "model"},
)
OVERLAPS = [(size, stride) for size in (2, 3, 4) for stride in range(1, size + 1)]
TITLES = [f"{size} layers, stride {stride}" for size, stride in OVERLAPS]
DEEPER = {"gpt2": {"n_layer": 5}, "gptj": {"n_layer": 5}, "bloom": {"n_layer": 5}}


def deep_model(shape: str) -> PreTrainedModel:
    """A tiny model of five layers."""
    return tiny_model(shape, **DEEPER.get(shape, {"num_hidden_layers": 5}))


def difference(values: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return ((values - expected).abs().max() / expected.abs().max()).item()


def kept_parameters(window: Window) -> list[torch.nn.Parameter]:
    """What a window trains and the next one does not train again."""
    again = {id(parameter) for parameter in window.shared_with_next()}
    return [parameter for parameter in window.own_parameters() if id(parameter) not in again]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_replaying_the_recorded_calls_equals_the_models_own_forward(
    shape: str, batch_size: int, tokens_BT: Tensor
) -> None:
    model, tokens_BT = model_of(shape), tokens_BT[:batch_size]
    decoder = Decoder(model, torch.device("cpu"))
    hidden_BTD, calls = decoder.embed(tokens_BT)
    for layer, call in zip(decoder.layers, calls, strict=True):
        hidden_BTD = call_layer(layer, hidden_BTD, call)
    expected_BTV = model(tokens_BT, use_cache=False).logits
    assert (Head(decoder)(hidden_BTD) - expected_BTV).abs().max() == 0


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_calls_that_are_kept_by_shape_serve_other_tokens_too(shape: str, batch_size: int, tokens_BT: Tensor) -> None:
    model = model_of(shape)
    decoder = Decoder(model, torch.device("cpu"))
    decoder.calls(tokens_BT[:batch_size].flip(1))
    hidden_BTD, _ = decoder.embed(tokens_BT[:batch_size])
    for layer, call in zip(decoder.layers, decoder.calls(tokens_BT[:batch_size]), strict=True):
        hidden_BTD = call_layer(layer, hidden_BTD, call)
    assert torch.equal(Head(decoder)(hidden_BTD), model(tokens_BT[:batch_size], use_cache=False).logits)


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_windows_compose_to_the_model(shape: str, settings: dict[str, Any], tokens_BT: Tensor) -> None:
    model = model_of(shape)
    if settings["by"] == "half" and shape in REFUSED:
        with pytest.raises(ValueError, match="use windows=block"):
            partition(model, **settings)
        return
    expected_BTV = model(tokens_BT, use_cache=False).logits
    assert difference(compose(model, tokens_BT, **settings), expected_BTV) <= RELATIVE


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_every_parameter_that_outputs_depend_on_is_trained_in_exactly_one_window(
    shape: str, settings: dict[str, Any], tokens_BT: Tensor
) -> None:
    if settings["by"] == "half" and shape in REFUSED:
        pytest.skip("has no halves")
    model = tiny_model(shape)
    windows = layer_windows(model, **settings)
    decoder = Decoder(model, torch.device("cpu"))
    hidden_BTD, calls = decoder.embed(tokens_BT)
    names = {
        parameter: f"{index}.{name}"
        for index, layer in enumerate(decoder.layers)
        for name, parameter in layer.named_parameters()
        if "e_score_correction_bias" not in name  # it chooses among experts, and has no gradient
    }
    trained = [{names.get(parameter) for parameter in kept_parameters(window)} for window in windows]
    model.requires_grad_(True)
    users: dict[str, list[int]] = {name: [] for name in names.values()}
    for position, window in enumerate(windows):
        outputs_BTD = window(hidden_BTD, calls, slice(0, window.num_kept))
        weights_BTD = torch.randn(outputs_BTD.shape, generator=torch.Generator().manual_seed(position))
        gradients = torch.autograd.grad((outputs_BTD * weights_BTD).sum(), list(names), allow_unused=True)
        for name, gradient in zip(names.values(), gradients, strict=True):
            if gradient is not None and gradient.any():
                users[name].append(position)
        hidden_BTD = hidden_BTD if window.parallel_half == "first" else outputs_BTD.detach()
    assert all(users.values()), "the test sees every parameter at work"
    for name, positions in users.items():
        trainers = [position for position, mine in enumerate(trained) if name in mine]
        assert trainers == positions[:1], f"{name} is used by {positions}: what both halves use is the attention half's"
        assert len(positions) <= 1 or windows[positions[0]].parallel_half == "first", f"{name} is used by {positions}"


@pytest.mark.parametrize("shape", [shape for shape in EVERY_SHAPE if shape.values[0] not in REFUSED])
def test_every_parameter_of_the_layers_is_trained_in_exactly_one_half(shape: str) -> None:
    model = model_of(shape)
    held = [id(parameter) for window in layer_windows(model, by="half") for parameter in window.own_parameters()]
    layers = Decoder(model, torch.device("cpu")).layers
    assert sorted(held) == sorted(id(parameter) for layer in layers for parameter in layer.parameters())


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_every_matrix_is_in_exactly_one_window_under_its_name_in_the_model(
    shape: str, settings: dict[str, Any]
) -> None:
    if settings["by"] == "half" and shape in REFUSED:
        pytest.skip("has no halves")
    model = model_of(shape)
    found = Counter()
    for window in layer_windows(model, **settings):
        kept = {id(parameter) for parameter in kept_parameters(window)}
        mine = [matrix for matrix in window.matrices() if id(matrix.weight) in kept]
        assert all(model.get_parameter(matrix.name) is matrix.weight for matrix in mine)
        found.update(matrix.name for matrix in mine)
    blocks = [matrix.name for window in layer_windows(model) for matrix in window.matrices()]
    assert found == dict.fromkeys(blocks, 1)


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_a_depth_that_the_size_does_not_divide_keeps_every_layer_once(shape: str, tokens_BT: Tensor) -> None:
    model = deep_model(shape)
    expected_BTV = model(tokens_BT[:1], use_cache=False).logits
    layers = list(Decoder(model, torch.device("cpu")).layers)
    assert len(layers) == 5
    for size, stride in OVERLAPS:
        windows = layer_windows(model, by="blocks", size=size, stride=stride)
        kept = [layer for window in windows for layer in list(window.layers)[: window.num_kept]]
        assert [*map(id, kept)] == [*map(id, layers)], f"size {size}, stride {stride}"
        assert [index for window in windows for index in window.indices[: window.num_kept]] == [0, 1, 2, 3, 4]
        logits_BTV = compose(model, tokens_BT[:1], by="blocks", size=size, stride=stride)
        assert difference(logits_BTV, expected_BTV) <= RELATIVE, f"size {size}, stride {stride}"


@pytest.mark.parametrize(("size", "stride"), OVERLAPS, ids=TITLES)
def test_overlapping_windows_start_a_stride_apart_and_reach_the_last_layer(size: int, stride: int) -> None:
    windows = layer_windows(deep_model("llama"), by="blocks", size=size, stride=stride)
    assert [window.indices.start for window in windows] == list(range(0, 5, stride))[: len(windows)]
    assert all(len(window.indices) == size for window in windows[:-1])
    assert windows[-1].indices[-1] == 4 and windows[-1].num_kept == len(windows[-1].indices)
    assert all(window.indices[-1] < 4 for window in windows[:-1]), "no window behind one that reaches the end"


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
def test_windows_are_named_by_their_first_and_last_layer(settings: dict[str, int], names: list[str]) -> None:
    windows = layer_windows(deep_model("llama"), by="blocks", **settings)
    assert [window.name for window in windows] == names


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_changing_a_token_changes_no_output_before_it(shape: str, attention: str, tokens_BT: Tensor) -> None:
    if attention == "sdpa" and not model_of(shape)._supports_sdpa:
        pytest.skip("transformers has no sdpa attention for it")
    model = tiny_model(shape, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    position = 15  # beyond the sliding window, and not the last one
    changed_BT = tokens_BT.clone()
    changed_BT[:, position] = (changed_BT[:, position] + 7) % 61 + 3
    decoder, states = Decoder(model, torch.device("cpu")), []
    for tokens in (tokens_BT, changed_BT):
        hidden_BTD, calls = decoder.embed(tokens)
        states.append([])
        for window in layer_windows(model):
            hidden_BTD = window(hidden_BTD, calls)
            states[-1].append(hidden_BTD)
    for first_BTD, second_BTD in zip(*states, strict=True):
        assert difference(second_BTD[:, :position], first_BTD[:, :position]) <= RELATIVE
        assert difference(second_BTD[:, position], first_BTD[:, position]) > 1e-2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"by": "head"}, "matrix, half, block, blocks, model"),
        ({"by": "blocks", "size": 0}, "at least 1"),
        ({"by": "blocks", "size": 1.5}, "at least 1"),
        ({"by": "blocks", "size": 2, "stride": 3}, "1 to windows.size=2"),
        ({"by": "blocks", "size": 2, "stride": 0}, "1 to windows.size=2"),
        ({"by": "blocks", "size": 9}, "has 3 layers"),
        ({"by": "matrix", "head": True}, "no logits"),
        ({"skip": 1.0}, "windows.skip=1.0: expected a share"),
        ({"skip": True}, "windows.skip=True: expected a share"),
        ({"by": "half", "skip": 0.5}, "windows.skip=0.5 with windows=half: it compares the input and the output"),
        ({"by": "blocks", "size": 2, "stride": 1, "skip": 0.5}, "windows=blocks that overlap: it compares"),
    ],
    ids=str,
)
def test_an_unknown_kind_size_or_stride_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        partition(tiny_model("llama"), **settings)


def test_what_is_skipped_is_not_chosen_and_not_all_of_them_can_be() -> None:
    model = tiny_model("llama")
    cut = Partition(match="_0[01]").cut(model, skipped=["block_01", "block_02"])
    assert [window.is_chosen for window in cut] == [True, False, False]
    with pytest.raises(ValueError, match="windows.match=_01 windows.skip=0.5: of the windows that match, none is left"):
        Partition(match="_01", skip=0.5).cut(model, skipped=["block_01"])


def test_a_parameter_that_stands_in_two_layers_or_outside_of_them_too_is_refused_without_weights() -> None:
    for share in ("layer", "outside"):
        model = tiny_model("llama")
        layers = model.model.layers
        if share == "layer":
            layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
            other = r"model\.layers\.2\.mlp\.up_proj\.weight"
        else:
            model.extra = layers[0].mlp.up_proj
            other = r"extra\.weight"
        with pytest.raises(ValueError, match=rf"model\.layers\.0\.mlp\.up_proj\.weight and {other} are one parameter"):
            Partition().check(model)


@pytest.mark.skipif("zamba2" not in CONFIG_MAPPING, reason="the installed transformers does not know Zamba2")
def test_the_shared_blocks_of_zamba2_are_found_in_its_skeleton() -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    kinds = {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "num_mem_blocks": 1}
    mamba = {"mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "attention_head_dim": 16}
    config = AutoConfig.for_model("zamba2", **sizes, **kinds, **mamba)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="shared_transformer.* are one parameter"):
        Partition().check(model)


def test_windows_are_chosen_by_their_names_and_an_expression_without_a_match_lists_them() -> None:
    model = tiny_model("llama")
    chosen = [window.name for window in Partition(by="half", match="mlp").cut(model) if window.is_chosen]
    assert chosen == ["half_00_mlp", "half_01_mlp", "half_02_mlp"]
    assert all(window.is_chosen for window in Partition(by="block").cut(model))
    with pytest.raises(ValueError, match=r"windows\.match=conv: found in none of .*\(block_<n>\)"):
        Partition(by="block", match="conv").cut(model)
    for wrong in ("", "(", 3):
        with pytest.raises(ValueError, match=r"windows\.match=.*: expected a regular expression for names of windows"):
            Partition(by="block", match=wrong)
