"""Matrices are found by what layers do with them."""

import pytest
import torch
from conftest import EVERY_SHAPE, model_of
from torch import nn

from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import decoder_layers
from lit_recon.model.matrices import Matrix, layer_matrices, routers

ROUTERS = {  # by layer, from the modelling code of transformers
    "mixtral": ["mlp.gate.weight"] * 3,
    "qwen3_moe": ["mlp.gate.weight"] * 3,
    "gpt_oss": ["mlp.router.weight"] * 3,
    "deepseek_v3": [None, "mlp.gate.weight", "mlp.gate.weight"],
    "llama4": [None, "feed_forward.router.weight", None],
    "gemma4_moe": ["router.proj.weight"] * 3,
    "qwen3_next": ["mlp.gate.weight"] * 3,
    "granitemoehybrid": ["block_sparse_moe.router.weight"] * 3,
    "minimax": ["mlp.gate.weight"] * 3,
    "olmoe": ["mlp.gate.weight"] * 3,
    "phimoe": ["mlp.router.weight"] * 3,
    "granitemoe": ["block_sparse_moe.router.weight"] * 3,
    "glm4_moe": [None, "mlp.gate.weight", "mlp.gate.weight"],
    "ernie4_5_moe": [None, "mlp.gate.weight", "mlp.gate.weight"],  # with a bias of one row next to it
}


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_routers_are_found_and_nothing_else_is_taken_for_one(shape: str) -> None:
    for layer, expected in zip(decoder_layers(model_of(shape))[1], ROUTERS.get(shape, [None] * 3), strict=True):
        names = {id(parameter): name for name, parameter in layer.named_parameters()}
        assert [names[id(parameter)] for parameter in routers(layer)] == ([expected] if expected else [])


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_every_weight_but_routers_and_vectors_is_a_matrix(shape: str) -> None:
    prefix, layers = decoder_layers(model_of(shape))
    for index, layer in enumerate(layers):
        router = ROUTERS.get(shape, [None] * 3)[index]
        stacked = {"mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"} if shape == "gpt_oss" else set()
        expected = [
            f"{prefix}.{index}.{name}"
            for name, parameter in layer.named_parameters()
            if parameter.dim() >= 2 and name not in {router, *stacked}
        ]
        assert [matrix.name for matrix in layer_matrices(layer, f"{prefix}.{index}")] == expected


@pytest.mark.parametrize("shared", [1, 2])
def test_a_shared_expert_as_wide_as_there_are_experts_is_not_taken_for_a_router(shared: int) -> None:
    # Qwen3-Next has 512 experts and a shared expert of 512 hidden units.
    settings = {"n_routed_experts": 8, "moe_intermediate_size": 8 // shared, "n_shared_experts": shared}
    layer = decoder_layers(tiny_model("deepseek_v3", **settings))[1][1]
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    assert [names[id(parameter)] for parameter in routers(layer)] == ["mlp.gate.weight"]


@pytest.mark.parametrize(("input_dim", "experts"), [(1, 1), (0, 1), (1, 3), (0, 3)])
def test_a_view_by_expert_has_outputs_before_inputs_and_leads_back(input_dim: int, experts: int) -> None:
    outputs, inputs = 5, 4
    values = torch.arange(experts * outputs * inputs).view(experts, outputs, inputs)
    stored = values if input_dim else values.transpose(1, 2).contiguous()
    matrix = Matrix("w", nn.Parameter((stored if experts > 1 else stored[0]).float()), input_dim)
    assert matrix.experts == experts
    assert matrix.slice_bytes == outputs * inputs * 4
    assert torch.equal(matrix.by_expert(matrix.weight), values.float())
    assert torch.equal(matrix.as_weight(values.float()), matrix.weight)
    assert [matrix.label(expert) for expert in range(experts)] == (["w"] if experts == 1 else ["w[0]", "w[1]", "w[2]"])
    matrix.by_expert(matrix.weight.data)[-1, 2, 3] = -1  # a view, not a copy
    assert (matrix.weight == -1).sum() == 1


@pytest.mark.parametrize(("kind", "input_dim"), [("llama", 1), ("gpt2", 0)])
def test_rows_of_a_matrix_are_its_outputs_whichever_way_it_is_stored(kind: str, input_dim: int) -> None:
    layer = decoder_layers(tiny_model(kind))[1][0]
    for matrix in layer_matrices(layer, ""):
        assert matrix.input_dim == input_dim and matrix.experts == 1
        owner = layer.get_submodule(matrix.name.removesuffix(".weight"))
        (weight_OI,) = matrix.by_expert(matrix.weight)
        bias = getattr(owner, "bias", None)
        outputs = owner(torch.eye(weight_OI.shape[1])) - (0 if bias is None else bias)
        torch.testing.assert_close(outputs.T, weight_OI)
        assert torch.equal(matrix.as_weight(matrix.by_expert(matrix.weight)), matrix.weight)


def test_the_matrices_of_a_llama_layer_are_its_seven_projections() -> None:
    names = [matrix.name for matrix in layer_matrices(decoder_layers(tiny_model("llama"))[1][2], "model.layers.2")]
    attention = [f"model.layers.2.self_attn.{name}_proj.weight" for name in "qkvo"]
    mlp = [f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert names == attention + mlp
