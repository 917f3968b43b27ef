"""Norms and biases of a window, found by facts; the names that models give them are the check."""

import re

import pytest
from conftest import UNLIKE, model_of

from lit_recon.model.architectures import SHAPES
from lit_recon.model.partition import layer_windows
from lit_recon.model.vectors import vectors

ROUTERS = r"\.(gate|router)\.weight$"
OTHERS = {"gpt_oss": {"self_attn.sinks"}}  # vectors that are neither in a norm nor a bias


@pytest.mark.parametrize("shape", [one for one in UNLIKE if one in SHAPES])
def test_norms_are_what_models_call_norms_and_biases_what_they_call_biases(shape: str) -> None:
    model = model_of(shape)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for window in layer_windows(model):
        own = [names[id(parameter)] for parameter in window.own_parameters()]
        matrices = {matrix.name for matrix in window.matrices()}
        small = [name for name in own if name not in matrices and not re.search(ROUTERS, name)]
        norms, biases = ([names[id(one)] for one in group] for group in vectors(window))
        assert sorted(norms + biases) == sorted(small)
        for name in norms:
            assert re.search(r"norm|ln_", name) or name.split(".", 3)[-1] in OTHERS.get(shape, ())
        for name in biases:
            assert name.endswith("bias") and not re.search(r"norm|ln_", name)


def test_a_half_has_its_own_norms_and_a_single_matrix_has_none() -> None:
    model = model_of("llama")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    attention, mlp = layer_windows(model, by="half")[:2]
    assert [names[id(one)] for one in vectors(attention).norms] == ["model.layers.0.input_layernorm.weight"]
    assert [names[id(one)] for one in vectors(mlp).norms] == ["model.layers.0.post_attention_layernorm.weight"]
