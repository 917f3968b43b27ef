"""The two halves of a layer are what its equations say, and only layers that fall into halves have them."""

from functools import cache

import pytest
import torch
from conftest import CPU, EVERY_SHAPE, assert_close, model_of
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import Decoder, LayerCall, call_layer
from lit_recon.model.halves import Split, run_half, split_layer

PARALLEL = {"phi", "gpt_neox", "gptj", "falcon", "cohere2", "cohere"}
SHARED = {  # one norm before both sides; GPT-NeoX has two
    "phi": ["input_layernorm.weight", "input_layernorm.bias"],
    "gptj": ["ln_1.weight", "ln_1.bias"],
    "falcon": ["input_layernorm.weight", "input_layernorm.bias"],
    "cohere2": ["input_layernorm.weight"],
    "cohere": ["input_layernorm.weight"],
}
REFUSED = {
    "bloom": "no mlp side",
    "mpt": "no mlp side",
    "opt_post_norm": "do not make up the layer",
    "minimax": "do not make up the layer",
    "gemma4_moe": "do not make up the layer",
}
HAVING = [shape for shape in EVERY_SHAPE if shape.values[0] not in REFUSED]


@cache
def first_layer(shape: str) -> tuple[PreTrainedModel, torch.nn.Module, Tensor, LayerCall]:
    """A model's second layer (DeepSeek's first has no experts), hidden states and its call."""
    model = tiny_model(shape)
    decoder = Decoder(model, CPU.device)
    tokens_BT = torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(1))
    hidden_BTD, calls = decoder.embed(tokens_BT)
    return model, decoder.layers[1], hidden_BTD, calls[1]


@cache
def split_of(shape: str) -> Split:
    """How that layer falls into halves."""
    return split_layer(*first_layer(shape)[1:])


@pytest.mark.parametrize("shape", HAVING)
def test_halves_are_parallel_where_the_modelling_code_says_so(shape: str) -> None:
    assert split_of(shape).parallel == (shape in PARALLEL)


@pytest.mark.parametrize("shape", HAVING)
def test_halves_make_up_the_layer_in_turn_or_side_by_side(shape: str) -> None:
    _, layer, hidden_BTD, call = first_layer(shape)
    attention_BTD = run_half(layer, split_of(shape), "attention", hidden_BTD, call)
    if shape in PARALLEL:
        whole_BTD = attention_BTD + run_half(layer, split_of(shape), "mlp", hidden_BTD, call) - hidden_BTD
    else:
        whole_BTD = run_half(layer, split_of(shape), "mlp", attention_BTD, call)
    assert_close(whole_BTD, call_layer(layer, hidden_BTD, call))


@pytest.mark.parametrize("shape", HAVING)
def test_only_a_norm_before_both_sides_is_shared_and_it_is_trained_with_the_attention(shape: str) -> None:
    split = split_of(shape)
    assert sorted(split.shared) == sorted(SHARED.get(shape, []))
    assert set(split.shared) <= set(split.trained["attention"])
    assert not set(split.trained["attention"]) & set(split.trained["mlp"])


@pytest.mark.parametrize("shape", HAVING)
def test_each_side_changes_what_it_trains_and_nothing_of_the_other(shape: str) -> None:
    _, layer, hidden_BTD, call = first_layer(shape)
    split = split_of(shape)
    for side, other in (("attention", "mlp"), ("mlp", "attention")):
        before_BTD = run_half(layer, split, side, hidden_BTD, call)
        foreign = [name for name in split.trained[other] if name not in split.shared]
        kept = {name: layer.get_parameter(name).detach().clone() for name in foreign}
        for name in foreign:
            layer.get_parameter(name).data.add_(1.0)
        after_BTD = run_half(layer, split, side, hidden_BTD, call)
        for name, value in kept.items():
            layer.get_parameter(name).data.copy_(value)
        assert torch.equal(before_BTD, after_BTD), f"{side} depends on {foreign}"
        own = {name: layer.get_parameter(name).detach().clone() for name in split.trained[side]}
        for name in own.keys() - {"self_attn.k_proj.bias"}:  # without rotations it shifts all scores of a query alike
            noise = torch.randn(own[name].shape, generator=torch.Generator().manual_seed(0))
            layer.get_parameter(name).data.add_(noise)
            assert not torch.equal(run_half(layer, split, side, hidden_BTD, call), before_BTD), f"{side} without {name}"
            layer.get_parameter(name).data.copy_(own[name])


@pytest.mark.parametrize("shape", HAVING)
def test_halves_leave_no_trace_on_the_layer(shape: str) -> None:
    _, layer, hidden_BTD, call = first_layer(shape)
    before = [set(vars(module)) for module in layer.modules()]
    expected_BTD = call_layer(layer, hidden_BTD, call)
    split = split_layer(layer, hidden_BTD, call)
    run_half(layer, split, "mlp", hidden_BTD, call)
    assert [set(vars(module)) for module in layer.modules()] == before
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert torch.equal(call_layer(layer, hidden_BTD, call), expected_BTD)


def test_the_halves_of_a_sequential_layer_by_hand() -> None:
    _, layer, hidden_BTD, call = first_layer("llama")
    attention_BTD = hidden_BTD + layer.self_attn(layer.input_layernorm(hidden_BTD), *call.args, **call.kwargs)[0]
    mlp_BTD = hidden_BTD + layer.mlp(layer.post_attention_layernorm(hidden_BTD))
    assert_close(run_half(layer, split_of("llama"), "attention", hidden_BTD, call), attention_BTD)
    assert_close(run_half(layer, split_of("llama"), "mlp", hidden_BTD, call), mlp_BTD)


@pytest.mark.parametrize("shape", ["phi", "cohere2"])
def test_the_halves_of_a_parallel_layer_by_hand(shape: str) -> None:
    _, layer, hidden_BTD, call = first_layer(shape)
    normed_BTD = layer.input_layernorm(hidden_BTD)
    attention_BTD = hidden_BTD + layer.self_attn(normed_BTD, *call.args, **call.kwargs)[0]
    assert_close(run_half(layer, split_of(shape), "attention", hidden_BTD, call), attention_BTD)
    assert_close(run_half(layer, split_of(shape), "mlp", hidden_BTD, call), hidden_BTD + layer.mlp(normed_BTD))


def test_norms_behind_a_side_that_is_silent_belong_to_the_side_that_they_follow() -> None:
    # Gemma 2: norms before and behind each side; what is behind the silent one multiplies zeros.
    norms = {
        side: [name for name in split_of("gemma2").trained[side] if "norm" in name] for side in ("attention", "mlp")
    }
    assert norms == {
        "attention": ["input_layernorm.weight", "post_attention_layernorm.weight"],
        "mlp": ["pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"],
    }


def test_a_residual_multiplier_stays_with_each_half() -> None:
    _, layer, hidden_BTD, call = first_layer("granite")
    added_BTD = 0.5 * layer.mlp(layer.post_attention_layernorm(hidden_BTD))
    assert_close(run_half(layer, split_of("granite"), "mlp", hidden_BTD, call), hidden_BTD + added_BTD)


@pytest.mark.parametrize("shape", REFUSED)
def test_a_layer_without_halves_is_refused_with_the_reason_and_a_way_out(shape: str) -> None:
    with pytest.raises(ValueError, match=f"{REFUSED[shape]}.*use windows=block"):
        split_layer(*first_layer(shape)[1:])


def test_a_refused_layer_is_left_as_it_was() -> None:
    model, layer, hidden_BTD, call = first_layer("opt_post_norm")
    expected_BTD = call_layer(layer, hidden_BTD, call)
    with pytest.raises(ValueError, match="do not make up"):
        split_layer(layer, hidden_BTD, call)
    assert torch.equal(call_layer(layer, hidden_BTD, call), expected_BTD)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_whose_residual_goes_through_the_norm_is_refused() -> None:
    model = model_of("opt_post_norm")
    decoder = Decoder(model, torch.device("cpu"))
    hidden_BTD, calls = decoder.embed(torch.arange(24)[None])
    with pytest.raises(ValueError, match="do not make up the layer"):
        split_layer(decoder.layers[0], hidden_BTD, calls[0])
