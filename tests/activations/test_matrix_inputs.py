"""What single matrices are trained on: their own inputs and dense products, kept as rows or as second moments."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import CPU, chain_of, pairs
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_recon.activations import matrix_inputs as captured
from lit_recon.activations.chain import Chain
from lit_recon.activations.datamodule import Activations
from lit_recon.activations.disk_store import DiskStore
from lit_recon.activations.gram import GramSums, NormalEquations
from lit_recon.activations.matrix_inputs import MatrixInputs, check_experts
from lit_recon.activations.propagation import Propagation
from lit_recon.activations.steps import MatrixStep
from lit_recon.data.packing import PADDING
from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import Decoder, call_layer, decoder_layers
from lit_recon.model.matrices import LayerMatrices
from lit_recon.model.partition import Partition, partition
from lit_recon.model.verify import verify
from lit_recon.model.windows import MatrixWindow, Window

CALIBRATION, LENGTH = 3, 24
PARTS = {"calibration": slice(0, CALIBRATION), "held_out": slice(CALIBRATION, 5)}
LENGTHS = [24, 9, 17, 24, 5]
DENSE = Propagation(inputs="dense")
REGIMES = {
    "dense": DENSE,
    "dense, sparse statistics": Propagation(statistics="sparse"),
    "sparse inputs, dense targets": Propagation(inputs="sparse"),
    "mixed inputs, dense targets": Propagation(inputs="mix", mix=0.3),
    "sparse inputs, local targets": Propagation(inputs="sparse", targets="local"),
    "sparse all": Propagation(inputs="sparse", targets="local", statistics="sparse"),
    "mixed inputs, local targets": Propagation(inputs="mix", targets="local", mix=0.3),
}


@pytest.fixture
def tokens_ST() -> Tensor:
    """Three calibration and two held-out samples."""
    return torch.randint(3, 64, (5, LENGTH), generator=torch.Generator().manual_seed(1))


def padded(tokens_ST: Tensor) -> Tensor:
    """The samples, of different lengths."""
    return tokens_ST.where(torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None], PADDING)


@torch.no_grad()
def at_layer(
    model: PreTrainedModel,
    tokens_ST: Tensor,
    index: int,
    propagation: Propagation = DENSE,
    matrices: LayerMatrices | None = None,
) -> tuple[Chain, dict[str, MatrixWindow], Window]:
    """A chain behind changed layers, and the matrices of the next one by their names in it."""
    windows = [window for window in Partition(by="matrix").cut(model, matrices) if isinstance(window, MatrixWindow)]
    chain = chain_of(model, tokens_ST, CALIBRATION, propagation=propagation)
    for position, span in enumerate(dict.fromkeys(window.enclosing for window in windows)):
        mine = [window for window in windows if window.enclosing is span]
        if position == index:
            break
        chain.dense_pass(span)
        for number, parameter in enumerate(span.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(noise, alpha=0.1)
        chain.advance(span)
    return chain, {window.name.partition(".")[2]: window for window in mine}, span


@torch.no_grad()
def linear_inputs(chain: Chain, layer: nn.Module, states_STD: Tensor, index: int) -> dict[str, Tensor]:
    """What reaches each linear module of a layer that is run on these states, (S, T, I), by the module's name."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].view(*states_STD.shape[:2], args[0].shape[-1]))
        )
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    call_layer(
        layer, states_STD, Decoder(chain.passes.decoder.model, CPU.device).embed(chain.passes.tokens_ST)[1][index]
    )
    for handle in handles:
        handle.remove()
    return seen


def assert_close(values: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums."""
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)


# Inputs and products


@torch.no_grad()
@pytest.mark.parametrize("propagation", REGIMES)
def test_inputs_and_targets_are_those_of_the_dense_layer_run_on_the_right_chain(
    propagation: str, tokens_ST: Tensor
) -> None:
    chain, windows, span = at_layer(tiny_model("llama"), tokens_ST, 1, REGIMES[propagation])
    chain.dense_pass(span)
    (layer,) = span.layers
    data = MatrixInputs(span, chain)
    inputs = linear_inputs(chain, layer, chain.inputs_STD, 1)
    dense_targets = REGIMES[propagation].targets == "dense"
    sources = linear_inputs(chain, layer, chain.dense.states_STD, 1) if dense_targets else inputs
    assert set(windows) == set(inputs)
    for name, window in windows.items():
        made = data.activations(window)
        assert made.batching.num_samples == CALIBRATION and made.batching.valid_ST is None
        assert_close(made.inputs_STD, inputs[name])
        assert_close(made.targets_STD, sources[name] @ layer.get_submodule(name).weight.T)
    if REGIMES[propagation].inputs == "sparse" and dense_targets:
        assert (inputs["self_attn.q_proj"] - sources["self_attn.q_proj"]).abs().max() > 0.1, (
            "the chains have come apart"
        )


@torch.no_grad()
def test_q_k_and_v_share_their_inputs_and_o_has_its_own(tokens_ST: Tensor) -> None:
    chain, windows, span = at_layer(tiny_model("llama"), tokens_ST, 0)
    chain.dense_pass(span)
    data = MatrixInputs(span, chain)
    kept = {name: data.activations(window).inputs_STD for name, window in windows.items()}
    pointers = {name: inputs_STI.data_ptr() for name, inputs_STI in kept.items()}
    assert pointers["self_attn.q_proj"] == pointers["self_attn.k_proj"] == pointers["self_attn.v_proj"]
    assert pointers["mlp.gate_proj"] == pointers["mlp.up_proj"]
    assert len(set(pointers.values())) == 4


@torch.no_grad()
def test_matrices_that_share_inputs_share_one_pass_of_the_layer(tokens_ST: Tensor) -> None:
    chain, windows, span = at_layer(tiny_model("llama"), tokens_ST, 0)
    chain.dense_pass(span)
    data, passes = MatrixInputs(span, chain), []
    span.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        data.activations(windows[name])
    assert sum(passes) == 5 + 1, "and a sample that shows what is shared"


@torch.no_grad()
def test_the_layer_stays_dense_while_its_matrices_are_done_one_by_one(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    chain, windows, span = at_layer(model, tokens_ST, 0)
    chain.dense_pass(span)
    (layer,) = span.layers
    expected = linear_inputs(chain, layer, chain.inputs_STD, 0)
    data = MatrixInputs(span, chain)
    dense = {name: window.matrix.weight.clone() for name, window in windows.items()}
    for name, window in windows.items():
        made = data.activations(window)
        assert_close(made.inputs_STD, expected[name])
        assert_close(made.targets_STD, expected[name] @ dense[name].T)
        window.open()
        window.weight.zero_()
    assert all(torch.equal(window.matrix.weight, dense[name]) for name, window in windows.items())
    for window in windows.values():
        window.install()
    assert not any(window.matrix.weight.any() for window in windows.values())


@torch.no_grad()
def test_products_of_conv1d_are_with_the_weight_as_it_is_stored(tokens_ST: Tensor) -> None:
    chain, windows, span = at_layer(tiny_model("gpt2"), tokens_ST, 1)
    chain.dense_pass(span)
    (layer,) = span.layers
    inputs = linear_inputs(chain, layer, chain.inputs_STD, 1)
    data = MatrixInputs(span, chain)
    widths = {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 128), "mlp.c_proj": (128, 32)}
    assert list(windows) == list(widths)
    for name, window in windows.items():
        made = data.activations(window)
        assert_close(made.inputs_STD, inputs[name])
        assert_close(made.targets_STD, inputs[name] @ window.matrix.weight)
        assert (made.inputs_STD.shape[2], made.targets_STD.shape[2]) == widths[name]


def ordered(rows_NI: Tensor) -> Tensor:
    """Rows in an order that depends on the rows alone."""
    return rows_NI[rows_NI[:, 0].argsort()]


def routed(
    model: PreTrainedModel, tokens_ST: Tensor, states_STD: Tensor, index: int
) -> tuple[dict[str, list[list[Tensor]]], int]:
    """Rows of gate_up_proj and down_proj by expert, for calibration and held-out samples; Mixtral's equations."""
    block = decoder_layers(model)[1][index].mlp
    rows: dict[str, list[list[Tensor]]] = {"gate_up_proj": [], "down_proj": []}
    count = 0
    for part in PARTS.values():
        reached: list[Tensor] = []
        handle = block.register_forward_pre_hook(lambda _, args, reached=reached: reached.append(args[0][0]))
        for sample in range(5)[part]:  # one by one, without padding
            length = int((tokens_ST[sample] != PADDING).sum())
            calls = Decoder(model, CPU.device).embed(tokens_ST[sample : sample + 1, :length])[1]
            call_layer(decoder_layers(model)[1][index], states_STD[sample : sample + 1, :length], calls[index])
        handle.remove()
        inputs_ND = torch.cat(reached)
        chosen_NK = (inputs_ND @ block.gate.weight.T).topk(2).indices
        into = [inputs_ND[(chosen_NK == expert).any(1)] for expert in range(4)]
        between = []
        for expert, rows_ND in enumerate(into):
            gate_NO, up_NO = (rows_ND @ block.experts.gate_up_proj[expert].T).chunk(2, dim=1)
            between.append(nn.functional.silu(gate_NO) * up_NO)
        rows["gate_up_proj"].append(into)
        rows["down_proj"].append(between)
        count += len(inputs_ND)
    return rows, count


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
def test_rows_of_experts_are_those_routed_to_each_with_their_products(is_padded: bool, tokens_ST: Tensor) -> None:
    tokens_ST = padded(tokens_ST) if is_padded else tokens_ST[:, : LENGTH - 1]
    model = tiny_model("mixtral")
    chain, windows, span = at_layer(model, tokens_ST, 1)
    chain.dense_pass(span)
    expected, count = routed(model, tokens_ST, chain.inputs_STD, 1)
    assert count == int((tokens_ST != PADDING).sum())
    data, length = MatrixInputs(span, chain), tokens_ST.shape[1]
    for leaf in ("gate_up_proj", "down_proj"):
        made = data.activations(windows[f"mlp.experts.{leaf}"])
        weight_EOI = windows[f"mlp.experts.{leaf}"].matrix.weight
        assert made.inputs_STD.shape[1] == length
        experts_ST = made.batching.calls(torch.arange(len(made.inputs_STD)))[0].kwargs["experts"]
        valid_ST = (
            torch.ones_like(experts_ST, dtype=torch.bool) if made.batching.valid_ST is None else made.batching.valid_ST
        )
        for part, samples in enumerate((slice(0, made.batching.num_samples), slice(made.batching.num_samples, None))):
            mine_ST = valid_ST[samples]
            rows = sum(len(rows_NI) for rows_NI in expected[leaf][part])
            assert mine_ST.sum() == rows and len(mine_ST) == -(-rows // length), "the last sample alone is padded"
            for expert, rows_NI in enumerate(expected[leaf][part]):
                of_expert_ST = mine_ST & (experts_ST[samples] == expert)
                inputs_NI = made.inputs_STD[samples][of_expert_ST]
                assert_close(ordered(inputs_NI), ordered(rows_NI))
                assert_close(made.targets_STD[samples][of_expert_ST], inputs_NI @ weight_EOI[expert].T)
            assert not made.inputs_STD[samples][~mine_ST].any()
    if is_padded:
        assert made.batching.valid_ST is not None and not made.batching.valid_ST.all()


@torch.no_grad()
def test_rows_of_experts_are_the_same_in_few_arrays_of_the_store_and_in_many(
    tokens_ST: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("mixtral")
    matrices = verify(model, tokens_ST)
    made, found = [], []
    for piece_bytes in (captured._PIECE_BYTES, 1):
        monkeypatch.setattr(captured, "_PIECE_BYTES", piece_bytes)
        chain, windows, span = at_layer(model, tokens_ST, 0, matrices=matrices)
        chain.dense_pass(span)
        shapes, zeros = [], chain.passes.store.zeros
        monkeypatch.setattr(
            chain.passes.store, "zeros", lambda shape, zeros=zeros, shapes=shapes: shapes.append(shape) or zeros(shape)
        )
        found.append(MatrixInputs(span, chain).activations(windows["mlp.experts.gate_up_proj"]))
        made.append(len(shapes))
    assert made[0] == 4, "a piece per part, the samples, their products"
    assert made[1] > 8, "a piece per product"
    assert torch.equal(found[0].inputs_STD, found[1].inputs_STD)
    assert torch.equal(found[0].targets_STD, found[1].targets_STD)


def test_an_expert_without_tokens_behind_a_full_piece_takes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "_PIECE_BYTES", 4 * 8)
    rows, rows_NI = captured._RowPieces(DiskStore(tmp_path)), torch.randn(4, 8)
    rows.add(rows_NI, 0)
    rows.add(torch.zeros(0, 8), 1)
    rows.put_away()
    ((piece_NI, experts_N),) = rows.pop_all()
    assert rows.count == 4 and torch.equal(piece_NI, rows_NI.bfloat16()) and experts_N.tolist() == [0] * 4


@torch.no_grad()
def test_llama_4s_rows_of_zeros_are_not_trained_on(tokens_ST: Tensor) -> None:
    model = tiny_model("llama4")
    chain, windows, span = at_layer(model, tokens_ST, 1, matrices=verify(model, tokens_ST))
    chain.dense_pass(span)
    made = MatrixInputs(span, chain).activations(windows["feed_forward.experts.gate_up_proj"])
    assert made.inputs_STD.flatten(0, 1).any(1).sum() == 5 * LENGTH, "one expert per token"
    assert made.batching.valid_ST is None and len(made.inputs_STD) == 5


@torch.no_grad()
def test_rows_of_padded_samples_are_those_of_their_text_in_order(tokens_ST: Tensor) -> None:
    tokens_ST = padded(tokens_ST)
    chain, windows, span = at_layer(tiny_model("llama"), tokens_ST, 0)
    chain.dense_pass(span)
    made = MatrixInputs(span, chain).activations(windows["self_attn.q_proj"])
    normed_STD = span.layers[0].input_layernorm(chain.inputs_STD)
    assert made.batching.valid_ST is not None
    for part, samples in PARTS.items():
        mine = slice(0, made.batching.num_samples) if part == "calibration" else slice(made.batching.num_samples, None)
        rows_NI = normed_STD[samples][tokens_ST[samples] != PADDING]
        assert_close(made.inputs_STD[mine][made.batching.valid_ST[mine]], rows_NI)
        assert_close(
            made.targets_STD[mine][made.batching.valid_ST[mine]], rows_NI @ windows["self_attn.q_proj"].matrix.weight.T
        )


# Second moments


def errors_by_hand(
    window: MatrixWindow, kept: Activations
) -> tuple[float, list[tuple[float, float]], list[tuple[Tensor, Tensor]]]:
    """Median energy of the calibration targets, errors in this unit, and rows of targets and outputs, in float64."""
    valid_ST = kept.batching.valid_ST
    if valid_ST is None:
        valid_ST = torch.ones(kept.inputs_STD.shape[:2], dtype=torch.bool)
    outputs_STO = window(kept.inputs_STD, kept.batching.calls(torch.arange(len(kept.inputs_STD))))
    found, parts = [], (slice(0, kept.batching.num_samples), slice(kept.batching.num_samples, None))
    for part in parts:
        mine_ST = valid_ST[part]
        targets_NO = kept.targets_STD[part][mine_ST].double()
        found.append((targets_NO, outputs_STO[part][mine_ST].double()))
    unit = found[0][0].square().mean(-1).median().item()
    errors = [(one - other).square().mean(-1) / unit for one, other in found]
    return unit, [(of_rows_N.mean().item(), of_rows_N.median().item()) for of_rows_N in errors], found


@torch.no_grad()
def prune_roughly(window: MatrixWindow) -> None:
    """Zero a third of the weights of a copy."""
    window.open()
    window.weight.mul_(torch.rand(window.weight.shape, generator=torch.Generator().manual_seed(3)) > 0.33)


def moments_of(
    shape: str, tokens_ST: Tensor, propagation: Propagation
) -> Sequence[tuple[str, MatrixWindow, NormalEquations, Activations]]:
    """The moments and the kept activations of all matrices of a layer."""
    model = tiny_model(shape)
    chain, windows, span = at_layer(model, tokens_ST, 1, propagation, verify(model, tokens_ST))
    data = MatrixInputs(span, chain)
    if propagation.independent:
        chain.dense_pass(span, [data])
    else:
        chain.dense_pass(span)
        if propagation.inputs == "dense":
            chain.passes.run(span, chain.inputs_STD, None, [data])
    return [(name, window, data.normal_equations(window), data.activations(window)) for name, window in windows.items()]


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("shape", "propagation"), pairs(["llama", "gpt2", "phi"], [*REGIMES], ["llama"], ["sparse all"])
)
def test_moments_tell_unit_and_errors_of_the_kept_activations(
    shape: str, propagation: str, is_padded: bool, tokens_ST: Tensor
) -> None:
    tokens_ST = padded(tokens_ST) if is_padded else tokens_ST
    for name, window, moments, kept in moments_of(shape, tokens_ST, REGIMES[propagation]):
        prune_roughly(window)
        unit, errors, _ = errors_by_hand(window, kept)
        assert min(errors[0]) > 0.01
        assert moments.unit() == pytest.approx(unit, rel=1e-4), name
        assert kept.unit() == pytest.approx(unit, rel=1e-4), name
        for part, expected in enumerate(errors):
            assert moments.errors(window, unit)[part] == pytest.approx(expected, rel=1e-4), name
        assert kept.errors(window, unit)[1] == pytest.approx(errors[1], rel=1e-4), name


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("shape", "propagation"),
    pairs(
        ["mixtral", "gpt_oss", "deepseek_v3", "llama4"],
        ["dense", "sparse all", "mixed inputs, local targets"],
        ["mixtral"],
        ["sparse all"],
    ),
)
def test_moments_of_experts_tell_unit_and_errors_over_the_rows_of_all_of_them(
    shape: str, propagation: str, is_padded: bool, tokens_ST: Tensor
) -> None:
    tokens_ST = padded(tokens_ST) if is_padded else tokens_ST
    found = [made for made in moments_of(shape, tokens_ST, REGIMES[propagation]) if made[1].matrix.experts > 1]
    assert len(found) == 2
    for name, window, moments, kept in found:
        prune_roughly(window)
        unit, errors, rows = errors_by_hand(window, kept)
        counts = int(moments.calibration.num_rows), int(moments.held_out.num_rows)
        assert counts == tuple(len(targets_NO) for targets_NO, _ in rows), name
        assert moments.unit() == pytest.approx(unit, rel=1e-4), name
        for part, expected in enumerate(errors):
            assert moments.errors(window, unit)[part] == pytest.approx(expected, rel=1e-4), name


@torch.no_grad()
def test_moments_of_a_shared_input_are_gathered_once(tokens_ST: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    added = []
    monkeypatch.setattr(GramSums, "add", lambda self, rows_NI: added.append(len(rows_NI)))
    chain, _, span = at_layer(tiny_model("llama"), tokens_ST, 0)
    chain.dense_pass(span, [MatrixInputs(span, chain)])
    assert sum(added) == 4 * 5 * LENGTH, "of q, o, gate and down; not of k, v and up"


@torch.no_grad()
def test_the_gram_matrix_is_that_of_the_calibration_rows_alone(tokens_ST: Tensor) -> None:
    for name, window, moments, kept in moments_of("llama", tokens_ST, DENSE):
        for equations, part in ((moments.calibration, PARTS["calibration"]), (moments.held_out, PARTS["held_out"])):
            inputs_NI = kept.inputs_STD[part].flatten(0, 1).double()
            targets_NO = kept.targets_STD[part].flatten(0, 1).double()
            assert_close(equations.gram_EII[0].double(), inputs_NI.T @ inputs_NI)
            torch.testing.assert_close(
                equations.cross_EOI[0].double(), targets_NO.T @ inputs_NI, rtol=1e-4, atol=1e-3, msg=name
            )
        for errors in moments.errors(window, 1.0):
            assert errors == pytest.approx((0, 0), abs=1e-5), "the dense matrix has no error"


# Experts see other tokens in another chain


@pytest.mark.parametrize("inputs", ["sparse", "mix"])
def test_matrices_of_experts_with_dense_targets_of_other_inputs_are_refused(inputs: str) -> None:
    models = tiny_model("mixtral"), tiny_model("llama")
    mixture, plain = ([matrix for layer in partition(model) for matrix in layer.matrices()] for model in models)
    with pytest.raises(
        ValueError, match=rf"chain\.inputs={inputs} with chain\.targets=dense.*6 such.*use chain\.targets"
    ):
        check_experts(mixture, Propagation(inputs=inputs))
    check_experts(mixture, Propagation(inputs=inputs, targets="local"))
    check_experts(mixture, Propagation(inputs="dense", statistics="sparse"))
    check_experts(plain, Propagation(inputs=inputs))


@torch.no_grad()
def test_a_layer_is_run_no_further_than_to_the_matrix_once_that_is_known(
    tokens_ST: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    chain, windows, layer = at_layer(model, tokens_ST, 1, Propagation(inputs="sparse"))
    chain.dense_pass(layer)
    entered, mlp = list[str](), type(model.model.layers[1].mlp)
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, *args: entered.append("mlp") or forward(self, *args))
    looks = {MatrixInputs.activations: (2, 2, 6), MatrixInputs.normal_equations: (1, 1, 6)}  # of 3 batches of 2 chains
    for look, expected in looks.items():
        for name, batches in zip(("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"), expected, strict=True):
            entered.clear()
            assert look(MatrixInputs(layer, chain), windows[name]) is not None
            assert len(entered) == batches + 1, f"{name}: the first to its end, as one that shows what is shared"


@torch.no_grad()
@pytest.mark.parametrize("propagation", [name for name in REGIMES if REGIMES[name].inputs != "dense"])
def test_on_sparse_inputs_matrices_see_what_those_before_them_have_become(tokens_ST: Tensor, propagation: str) -> None:
    chain, windows, span = at_layer(tiny_model("llama"), tokens_ST, 1, REGIMES[propagation])
    chain.dense_pass(span)
    (layer,) = span.layers
    by_hand, data = deepcopy(layer), MatrixInputs(span, chain)
    for name, window in windows.items():
        inputs_STI = linear_inputs(chain, by_hand, chain.inputs_STD, 1)[name]
        sources_STI = inputs_STI
        if not REGIMES[propagation].one_source:
            assert chain.dense
            sources_STI = linear_inputs(chain, layer, chain.dense.states_STD, 1)[name]
        targets_STO = sources_STI @ window.matrix.weight.T
        made, moments = data.activations(window), data.normal_equations(window)
        assert made is not None and moments is not None
        assert_close(made.inputs_STD, inputs_STI)
        assert_close(made.targets_STD, targets_STO)
        inputs_NI, targets_NO = (array_STD[:CALIBRATION].flatten(0, 1) for array_STD in (inputs_STI, targets_STO))
        assert_close(moments.calibration.gram_EII[0], inputs_NI.T @ inputs_NI)
        assert_close(moments.calibration.cross_EOI[0], targets_NO.T @ inputs_NI)
        window.open()
        window.weight.mul_(0.5)
        by_hand.get_parameter(f"{name}.weight").mul_(0.5)
        data.done.append(window)
    halved = [torch.equal(window.weight, 0.5 * window.matrix.weight) for window in windows.values()]
    assert all(halved), "outside of the passes the layer is dense"


@torch.no_grad()
def test_a_step_hands_each_matrix_on_to_the_next(tokens_ST: Tensor) -> None:
    chain, windows, span = at_layer(tiny_model("llama"), tokens_ST, 1, Propagation(inputs="sparse"))
    chain.dense_pass(span)
    step, before = MatrixStep(span, [*windows.values()], chain, needs_gram=False, solves_first=False), list[str]()
    for window, _ in step.training_data():
        assert [one.name for one in step.inputs.done] == before
        before.append(window.name)
    assert len(before) == 7
