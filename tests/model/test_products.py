"""The products that are observed are those that layers make with their matrices."""

from collections.abc import Callable

import pytest
import torch
from conftest import CPU, EVERY_SHAPE, model_of
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_recon.fit.pruning_checks import check_scored
from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import Decoder, call_layer, decoder_layers
from lit_recon.model.matrices import LayerMatrices, Matrix, find_matrices, layer_matrices, routers
from lit_recon.model.partition import layer_windows
from lit_recon.model.products import Product, learn_input_dims, observing_products
from lit_recon.model.verify import verify

EXPERTS = 4


def ordered(rows_NI: Tensor) -> Tensor:
    """Rows in an order that depends on the rows alone."""
    return rows_NI[rows_NI[:, 0].argsort()]


def in_windows(model: PreTrainedModel, matrices: LayerMatrices) -> list[Matrix]:
    """The matrices of all windows of a model, of which this is known."""
    return [matrix for window in layer_windows(model, matrices) for matrix in window.matrices()]


def observe(model: PreTrainedModel, tokens_BT: Tensor, matrices: LayerMatrices) -> dict[str, list[Product]]:
    """All products of a pass, by the matrix's name."""
    seen: dict[str, list[Product]] = {}
    found = in_windows(model, matrices)
    with observing_products(found, lambda product: seen.setdefault(product.matrix.name, []).append(product)):
        model(tokens_BT, use_cache=False)
    return seen


def test_what_is_observed_is_what_the_matrix_is_multiplied_by() -> None:
    linear = nn.Linear(3, 2)
    (matrix,) = layer_matrices(linear, "linear")
    inputs = torch.arange(30.0).view(2, 5, 3)
    seen: list[Product] = []
    with observing_products([matrix], seen.append):
        linear(inputs)
    linear(torch.zeros(1, 3))
    (product,) = seen
    assert (product.matrix.name, product.expert, product.input_dim) == ("linear.weight", 0, 1)
    assert torch.equal(product.rows_NI, inputs.view(10, 3))


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_plain_products_are_those_of_the_modules(shape: str, tokens_BT: Tensor) -> None:
    model = tiny_model(shape)
    made: dict[str, list[tuple[Tensor, Tensor]]] = {}
    prefix, layers = decoder_layers(model)
    chosen = {id(router) for layer in layers for router in routers(layer)}
    for name, module in layers.named_modules(prefix=prefix):
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in chosen:

            def note(module: nn.Module, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
                bias = 0 if module.bias is None else module.bias
                made.setdefault(f"{name}.weight", []).append((args[0], output - bias))

            module.register_forward_hook(note)
    seen = observe(model, tokens_BT, find_matrices(model))
    plain = {name: products for name, products in seen.items() if products[0].matrix.experts == 1}
    assert set(plain) == set(made)
    for name, products in plain.items():
        assert len(products) == len(made[name]) == 1, name
        (product,), ((inputs, output),) = products, made[name]
        assert product.inputs.data_ptr() == inputs.data_ptr() and product.expert == 0
        assert torch.equal(product.rows_NI, inputs.flatten(0, -2))
        weight_OI = product.matrix.by_expert(product.matrix.weight)[0]
        assert product.input_dim == product.matrix.input_dim
        torch.testing.assert_close(inputs @ weight_OI.T, output, rtol=1e-4, atol=1e-4)


def top_k(logits_NE: Tensor, count: int) -> Tensor:
    """Which experts are chosen, boolean (N, E)."""
    return torch.zeros_like(logits_NE, dtype=torch.bool).scatter(1, logits_NE.topk(count, dim=1).indices, True)


def halved(gate_up_NO: Tensor, _: nn.Module) -> Tensor:
    gate_NO, up_NO = gate_up_NO.chunk(2, dim=-1)
    return functional.silu(gate_NO) * up_NO


def interleaved(gate_up_NO: Tensor, experts: nn.Module) -> Tensor:
    """gpt-oss: clamped, with a slope, every second output a gate."""
    gate_NO = gate_up_NO[:, ::2].clamp(max=experts.limit)
    up_NO = gate_up_NO[:, 1::2].clamp(-experts.limit, experts.limit)
    return (up_NO + 1) * gate_NO * torch.sigmoid(experts.alpha * gate_NO)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize(
    ("shape", "router", "transposed", "between"),
    [
        ("mixtral", "gate", False, halved),
        ("qwen3_moe", "gate", False, halved),
        ("deepseek_v3", "gate", False, halved),
        ("gpt_oss", "router", True, interleaved),
    ],
)
def test_products_of_fused_experts_are_of_the_tokens_routed_to_each(
    shape: str,
    router: str,
    transposed: bool,
    between: Callable[[Tensor, nn.Module], Tensor],
    implementation: str,
    tokens_BT: Tensor,
) -> None:
    model = tiny_model(shape)
    try:
        model.set_experts_implementation(implementation)
    except ImportError as refused:  # grouped products with transformers 5.0 and PyTorch before 2.9
        pytest.skip(str(refused))
    index = 1
    block = decoder_layers(model)[1][index].mlp
    reached: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, args: reached.append(args[0].flatten(0, 1)))
    seen = observe(model, tokens_BT, find_matrices(model))
    (inputs_ND,) = reached
    gate, experts = getattr(block, router), block.experts
    logits_NE = functional.linear(inputs_ND, gate.weight, getattr(gate, "bias", None))
    chosen_NE = top_k(logits_NE, 2)  # softmax and sigmoid keep the order
    assert chosen_NE.sum(0).unique().numel() > 1 and chosen_NE.any(0).all(), "experts of different popularity"
    for leaf in ("gate_up_proj", "down_proj"):
        products = seen[f"model.layers.{index}.mlp.experts.{leaf}"]
        assert [product.expert for product in products] == list(range(EXPERTS))
        assert {product.input_dim for product in products} == {0 if transposed else 1}
        for expert, product in enumerate(products):
            rows_ND = inputs_ND[chosen_NE[:, expert]]
            if leaf == "down_proj":
                weight = experts.gate_up_proj[expert]
                bias = experts.gate_up_proj_bias[expert] if transposed else 0
                rows_ND = between(rows_ND @ (weight if transposed else weight.T) + bias, experts)
            assert product.rows_NI.shape == rows_ND.shape
            torch.testing.assert_close(ordered(product.rows_NI), ordered(rows_ND), rtol=1e-4, atol=1e-5)


def test_llama_4_gives_every_expert_every_token_and_rows_are_those_that_chose_it(tokens_BT: Tensor) -> None:
    model = tiny_model("llama4")
    matrices = verify(model, tokens_BT)
    block = decoder_layers(model)[1][1].feed_forward
    reached: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, args: reached.append(args[0].flatten(0, 1)))
    seen = observe(model, tokens_BT, matrices)
    (inputs_ND,) = reached
    logits_NE = inputs_ND @ block.router.weight.T
    scores_NE = torch.sigmoid(logits_NE) * top_k(logits_NE, 1)
    for leaf in ("gate_up_proj", "down_proj"):
        products = seen[f"model.layers.1.feed_forward.experts.{leaf}"]
        assert [(product.expert, product.input_dim) for product in products] == [(e, 0) for e in range(EXPERTS)]
        for expert, product in enumerate(products):
            rows_ND = inputs_ND * scores_NE[:, expert, None]
            if leaf == "down_proj":
                rows_ND = halved(rows_ND @ block.experts.gate_up_proj[expert], block)
            torch.testing.assert_close(product.inputs, rows_ND, rtol=1e-4, atol=1e-5)
            chosen_N = scores_NE[:, expert] != 0
            torch.testing.assert_close(product.rows_NI, rows_ND[chosen_N], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_every_matrix_is_seen_and_multiplies_what_its_input_dim_says(shape: str, tokens_BT: Tensor) -> None:
    model = tiny_model(shape)
    matrices = verify(model, tokens_BT)
    found = in_windows(model, matrices)
    seen = observe(model, tokens_BT, matrices)
    assert set(seen) == {matrix.name for matrix in found}
    for matrix in found:
        for product in seen[matrix.name]:
            assert product.input_dim == matrix.input_dim
            assert product.inputs.shape[-1] == matrix.by_expert(matrix.weight).shape[2]


def test_how_experts_are_stored_is_learnt_from_a_pass_where_nothing_tells_it(tokens_BT: Tensor) -> None:
    model = tiny_model("llama4")
    experts = "model.layers.1.feed_forward.experts"

    def dims(matrices: LayerMatrices) -> dict[str, int | None]:
        return {matrix.name: matrix.input_dim for layer in matrices for matrix in layer if matrix.experts > 1}

    found = find_matrices(model)
    assert dims(found) == {f"{experts}.gate_up_proj": None, f"{experts}.down_proj": None}
    learnt = learn_input_dims(found, lambda: model(tokens_BT))
    assert dims(learnt) == {f"{experts}.gate_up_proj": 0, f"{experts}.down_proj": 0}


def learnt_dims(layer: nn.Module, run: Callable[[], object]) -> dict[str, int | None]:
    (learnt,) = learn_input_dims([tuple(layer_matrices(layer, "layers.0"))], run)
    return {matrix.name.removeprefix("layers.0."): matrix.input_dim for matrix in learnt}


def test_what_no_product_uses_is_no_matrix_if_it_is_a_vector_or_of_an_ordinary_module() -> None:
    layer, x = nn.Module(), torch.randn(5, 4)
    layer.used, layer.unused = nn.Linear(4, 12), nn.Linear(4, 12)
    layer.scale = nn.Parameter(torch.randn(3, 4))  # of a norm for each of three heads
    layer.decay = nn.Parameter(torch.randn(1, 1, 3, 1))
    layer.kernel = nn.Parameter(torch.randn(6, 4))  # larger than any vector: used in a way that was not seen
    run = lambda: layer.used(x).view(5, 3, 4) * layer.scale * layer.decay[0, 0]  # noqa: E731
    assert learnt_dims(layer, run) == {"kernel": None, "used.weight": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_bent_by_a_curve_is_no_matrix_whatever_its_size(dtype: torch.dtype) -> None:
    layer, x = nn.Module(), torch.randn(5, 4)
    layer.used = nn.Linear(4, 4)
    layer.rates, layer.gates, layer.kernel = (nn.Parameter(torch.randn(6, 4, dtype=dtype)) for _ in range(3))
    layer.norm = nn.Parameter(torch.randn(6, 4, dtype=dtype))  # a copy in another dtype is no curve

    def run() -> None:
        -torch.exp(layer.rates.float()) * functional.softplus(layer.gates) * layer.kernel.float()
        layer.norm.float().mul(2), layer.used(x)

    assert learnt_dims(layer, run) == {"kernel": None, "norm": None, "used.weight": 1}


@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_rates_of_decay_of_state_space_models_are_no_matrices(kind: str, tokens_BT: Tensor) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 2, "state_size": 8}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_offset": 1, "attn_layer_period": 2}
    experts = {"num_experts": 2, "expert_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False}
    config = AutoConfig.for_model(kind, **sizes, **(more | experts if kind == "jamba" else {}))
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    before = [matrix.name for layer in find_matrices(model) for matrix in layer]
    found = [matrix for layer in verify(model, tokens_BT) for matrix in layer]
    assert any(name.endswith("A_log") for name in before)
    assert {name.rpartition(".")[2] for name in before} - {matrix.name.rpartition(".")[2] for matrix in found} == {
        "A_log"
    }
    check_scored(found, allow_unscored=False)


def test_a_weight_of_an_operation_that_is_not_read_stays_unknown_unless_it_is_depthwise() -> None:
    layer, x = nn.Module(), torch.randn(1, 8, 5)
    layer.wide, layer.conv, layer.depthwise = nn.Linear(5, 99), nn.Conv1d(8, 2, 4), nn.Conv1d(8, 8, 4, groups=8)
    layer.small = nn.Parameter(torch.randn(5, 3))
    use = lambda: torch.einsum("btd,de->bte", x, layer.small)  # noqa: E731
    run = lambda: (layer.wide(x), layer.conv(x), layer.depthwise(x), use())  # noqa: E731
    assert learnt_dims(layer, run) == {"small": None, "wide.weight": 1, "conv.weight": None}


def test_an_expert_in_a_module_of_its_own_that_saw_no_token_is_a_matrix_where_others_saw_some() -> None:
    layer, x = nn.Module(), torch.randn(5, 4)
    layer.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    layer.idle = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    assert list(learnt_dims(layer, lambda: layer.experts[1](x))) == [f"experts.{index}.weight" for index in range(3)]


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, w: functional.linear(x, w),
        lambda x, w: x @ w.T,
        lambda x, w: torch.matmul(x, w.mT),
        lambda x, w: torch.mm(x, w.t()),
        lambda x, w: torch.addmm(torch.zeros(1), x, w.transpose(0, 1)),
        lambda x, w: x.matmul(w.T),
        lambda x, w: x.mm(w.T),
    ],
    ids=["linear", "@", "matmul", "mm", "addmm", "Tensor.matmul", "Tensor.mm"],
)
@pytest.mark.parametrize("outputs", [6, 4], ids=["wide", "square"])
def test_every_way_to_write_a_product_is_seen(multiply: Callable[[Tensor, Tensor], Tensor], outputs: int) -> None:
    weight, rows, seen = nn.Parameter(torch.randn(outputs, 4)), torch.randn(7, 4), []
    with observing_products([Matrix("w", weight, 1)], seen.append):
        multiply(rows, weight)
    assert [(product.expert, product.input_dim) for product in seen] == [(0, 1)]
    assert torch.equal(seen[0].rows_NI, rows)


def test_a_weight_used_as_it_is_stored_is_summed_over_its_first_dimension() -> None:
    weight, rows, seen = nn.Parameter(torch.randn(4, 4)), torch.randn(7, 4), []
    with observing_products([Matrix("w", weight, 1)], seen.append):
        rows @ weight
    assert [product.input_dim for product in seen] == [0]


def test_nothing_is_seen_outside_of_the_context_nor_of_other_matrices(tokens_BT: Tensor) -> None:
    model = model_of("llama")
    decoder = Decoder(model, CPU.device)
    hidden_BTD, calls = decoder.embed(tokens_BT)
    (first, *others), seen = layer_matrices(decoder.layers[0], "0"), []
    with observing_products([first], lambda product: seen.append(product.matrix.name)):
        call_layer(decoder.layers[0], hidden_BTD, calls[0])
        call_layer(decoder.layers[1], hidden_BTD, calls[1])
    call_layer(decoder.layers[0], hidden_BTD, calls[0])
    assert others and seen == [first.name]


def test_fused_experts_that_are_used_out_of_sight_cannot_be_scored(tokens_BT: Tensor) -> None:
    model = tiny_model("mixtral", experts_implementation="batched_mm")  # gathers a copy of the weights of each token
    found = in_windows(model, verify(model, tokens_BT))
    with pytest.raises(ValueError, match=r"6 of 18 matrices .*experts\.gate_up_proj"):
        check_scored(found, allow_unscored=False)
