"""What windows are trained on, towards what, and what statistics see: compared with windows run by hand."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, LENGTHS, PADDED, assert_close, chain_of, module, pairs, title
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from walks import (
    CALIBRATION,
    LENGTH,
    SAMPLES,
    SHARE,
    VALID,
    Walk,
    chain_in,
    change,
    each,
    propagation_of,
    title_of,
)

from lit_recon.activations.datamodule import Activations
from lit_recon.activations.disk_store import DiskStore
from lit_recon.activations.propagation import Propagation
from lit_recon.data.packing import PADDING
from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import Decoder, call_layer
from lit_recon.model.head import Head
from lit_recon.model.partition import layer_windows
from lit_recon.model.products import observing_products
from lit_recon.model.verify import verify
from lit_recon.model.windows import Window
from lit_recon.modules.losses import mean_squared


@pytest.fixture
def tokens_ST() -> Tensor:
    """Three calibration and two held-out samples: not a multiple of the batch of two."""
    return torch.randint(3, 64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


@contextmanager
def linear_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What reaches each linear module, as rows, by the name of its weight."""
    seen: dict[str, list[Tensor]] = {}
    made: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(f"{name}.weight", []).append(args[0].flatten(0, -2))
        )
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    yield made
    for handle in handles:
        handle.remove()
    made |= {name: torch.cat(rows) for name, rows in seen.items()}


class Watched:
    """Rows of calibration samples that a chain shows to statistics, by matrix."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.rows: dict[str, list[Tensor]] = {}

    def observing(self, part: str) -> Any:
        def note(product: Any) -> None:
            self.rows.setdefault(product.matrix.name, []).append(product.rows_NI.clone())

        return observing_products(self.window.matrices(), note) if part == "calibration" else nullcontext()


@dataclass
class Case:
    """A shape, and how it is cut into windows."""

    shape: str
    settings: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)

    def model(self) -> PreTrainedModel:
        return tiny_model(self.shape, **self.changes)


CASES = {
    "blocks of llama": Case("llama", {"by": "block"}),
    "blocks of gemma2": Case("gemma2", {"by": "block"}),
    "blocks of mixtral": Case("mixtral", {"by": "block"}),
    "pairs of layers": Case("llama", {"by": "blocks", "size": 2}),
    "the model": Case("llama", {"by": "model"}),
    "overlapping blocks": Case("llama", {"by": "blocks", "size": 2, "stride": 1}),
    "overlapping threes": Case("gpt_neox", {"by": "blocks", "size": 3, "stride": 2}, changes={"num_hidden_layers": 5}),
    "sequential halves": Case("llama", {"by": "half"}),
    "parallel halves": Case("gpt_neox", {"by": "half"}),
    "parallel halves with a shared norm": Case("phi", {"by": "half"}),
    "parallel halves with a shared norm of Cohere": Case("cohere2", {"by": "half"}),
}
EXACTING = ("overlapping blocks", "parallel halves with a shared norm")  # the other cases do less
FEWEST, MOST = ("dense", "dense", "dense"), ("sparse", "dense", "sparse")  # chains
NORMS = {  # of the two sides
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "gpt_neox": ("input_layernorm", "post_attention_layernorm"),
    "phi": ("input_layernorm", "input_layernorm"),
    "cohere2": ("input_layernorm", "input_layernorm"),
}


class ByHand:
    """One window of a model, run from its layers' modules; halves by their equations.

    Only what the window covers is looked up in `window`: layers, how many are kept, which side.
    """

    def __init__(self, decoder: Decoder, tokens_ST: Tensor, window: Window, shape: str) -> None:
        self.layers, self.indices, self.shape = list(decoder.layers), list(window.indices), shape
        self.calls = decoder.embed(tokens_ST)[1]
        self.num_kept, self.side = window.num_kept, getattr(window, "side", None)

    def run(self, states_STD: Tensor, kept_only: bool = False) -> Tensor:
        if self.side:
            return states_STD + self.added(states_STD)
        for index in self.indices[: self.num_kept] if kept_only else self.indices:
            states_STD = call_layer(self.layers[index], states_STD, self.calls[index])
        return states_STD

    def added(self, states_STD: Tensor) -> Tensor:
        """What a half adds to the residual."""
        layer, call = self.layers[self.indices[0]], self.calls[self.indices[0]]
        norm = NORMS[self.shape][0 if self.side == "attention" else 1]
        normed_STD = getattr(layer, norm)(states_STD)
        if self.side == "mlp":
            return layer.mlp(normed_STD)
        attention = layer.attention if self.shape == "gpt_neox" else layer.self_attn
        return attention(normed_STD, *call.args, **call.kwargs)[0]


def mixed(choice: str, dense_STD: Tensor, sparse_STD: Tensor) -> Tensor:
    """What windows are trained on."""
    return {"dense": dense_STD, "sparse": sparse_STD, "mix": SHARE * dense_STD + (1 - SHARE) * sparse_STD}[choice]


@torch.no_grad()
@pytest.mark.parametrize(("case", "propagation"), pairs(CASES, VALID, EXACTING, (FEWEST, MOST)), ids=title)
def test_inputs_targets_and_statistics_are_those_of_windows_run_by_hand(
    case: str, propagation: tuple[str, str, str], tokens_ST: Tensor
) -> None:
    model = CASES[case].model()
    dense_model = copy.deepcopy(model)
    decoder, dense_decoder = Decoder(model, CPU.device), Decoder(dense_model, CPU.device)
    windows = layer_windows(model, **CASES[case].settings)
    chain = chain_of(model, tokens_ST, CALIBRATION, propagation=propagation_of(*propagation))
    inputs, targets, statistics = propagation
    dense_STD = sparse_STD = decoder.embed(tokens_ST)[0]
    added: dict[str, Tensor] = {}
    for position, window in enumerate(windows):
        now = ByHand(decoder, tokens_ST, window, CASES[case].shape)
        dense = ByHand(dense_decoder, tokens_ST, window, CASES[case].shape)
        trained_on_STD = mixed(inputs, dense_STD, sparse_STD)
        expected_STD = dense.run(dense_STD if targets == "dense" else trained_on_STD)
        if window.parallel_half == "second" and targets == "dense":  # makes up for what the first half has left
            apart_STD = added["dense first"] - mixed(inputs, added["dense first"], added["first"])
            expected_STD = expected_STD + apart_STD
        source, states_STD = (dense, dense_STD) if statistics == "dense" else (now, sparse_STD)
        seen_model = dense_model if statistics == "dense" else model
        few = ByHand(Decoder(seen_model, CPU.device), tokens_ST[:CALIBRATION], window, CASES[case].shape)
        with linear_inputs(seen_model) as seen:
            few.run(states_STD[:CALIBRATION])
        watched = Watched(window)

        chain.dense_pass(window, [watched])

        assert_close(chain.inputs_STD, trained_on_STD, f"{window.name}: inputs")
        assert_close(chain.targets_STD, expected_STD, f"{window.name}: targets")
        plain = {matrix.name for matrix in window.matrices() if matrix.experts == 1}
        assert plain and plain <= set(seen)
        for name in plain:
            assert_close(torch.cat(watched.rows[name]), seen[name], f"{window.name}: statistics of {name}")

        before = [parameter.clone() for parameter in window.shared_with_next()]
        change(window.own_parameters(), seed=position)
        chain.advance(window)
        if window.parallel_half:
            added[f"dense {window.parallel_half}"], added[window.parallel_half] = (
                dense.added(dense_STD),
                now.added(sparse_STD),
            )
            if window.parallel_half == "second":
                dense_STD = dense_STD + added["dense first"] + added["dense second"]
                sparse_STD = sparse_STD + added["first"] + added["second"]
        else:
            dense_STD, sparse_STD = dense.run(dense_STD, kept_only=True), now.run(sparse_STD, kept_only=True)
        for parameter, value in zip(window.shared_with_next(), before, strict=True):
            parameter.copy_(value)
        if chain.dense:
            assert_close(chain.dense.states_STD, dense_STD, f"dense chain behind {window.name}")
        if chain.sparse:
            assert_close(chain.sparse.states_STD, sparse_STD, f"sparse chain behind {window.name}")
    assert (dense_STD - sparse_STD).abs().max() > 0.1, "the chains have come apart"
    logits = model(tokens_ST, use_cache=False).logits, Head(decoder)(sparse_STD)
    assert_close(logits[1], logits[0], "the model of changed windows")
    assert (chain.dense is None) == (propagation == ("sparse", "local", "sparse"))
    assert (chain.sparse is None) == (propagation == ("dense", "dense", "dense"))


@torch.no_grad()
@pytest.mark.parametrize("shape", ["phi", "cohere2"])
@pytest.mark.parametrize("propagation", VALID, ids=" ".join)
def test_a_changed_shared_norm_is_dense_for_targets_alone(
    shape: str, propagation: tuple[str, str, str], tokens_ST: Tensor
) -> None:
    model = tiny_model(shape)
    first, second = layer_windows(model, by="half")[:2]
    layer = second.layer
    dense_norm = copy.deepcopy(layer.input_layernorm)
    chain = chain_of(model, tokens_ST, CALIBRATION, propagation=propagation_of(*propagation))
    chain.dense_pass(first)
    layer.input_layernorm.weight.mul_(3)
    chain.advance(first)
    states_STD = Decoder(model, CPU.device).embed(tokens_ST)[0]  # at the first layer all chains are the same
    call = Decoder(model, CPU.device).embed(tokens_ST)[1][0]
    watched = Watched(second)
    chain.dense_pass(second, [watched])

    def attention(normed_STD: Tensor) -> Tensor:
        return layer.self_attn(normed_STD, *call.args, **call.kwargs)[0]

    apart_STD = torch.zeros_like(states_STD)
    if propagation[1] == "dense":  # what the first half, by its changed norm, no longer adds
        was_STD, is_STD = (attention(norm(states_STD)) for norm in (dense_norm, layer.input_layernorm))
        apart_STD = was_STD - mixed(propagation[0], was_STD, is_STD)
    assert_close(chain.targets_STD, states_STD + layer.mlp(dense_norm(states_STD)) + apart_STD, "targets")
    norm = dense_norm if propagation[2] == "dense" else layer.input_layernorm
    rows = torch.cat(watched.rows["model.layers.0.mlp." + ("fc1" if shape == "phi" else "up_proj") + ".weight"])
    assert_close(rows, norm(states_STD)[:CALIBRATION].flatten(0, 1), "statistics")
    outputs_STD = second(states_STD, chain.passes.decoder.embed(tokens_ST)[1])
    assert_close(
        outputs_STD, states_STD + layer.mlp(layer.input_layernorm(states_STD)), "the norm is the changed one again"
    )


@torch.no_grad()
@pytest.mark.parametrize("statistics", ["dense", "sparse"])
@pytest.mark.parametrize("shape", ["gpt_neox", "phi", "falcon"])
def test_a_perfect_second_half_brings_the_sparse_chain_back_to_the_dense_one(
    shape: str, statistics: str, tokens_ST: Tensor
) -> None:
    chain = chain_of(
        tiny_model(shape), tokens_ST, CALIBRATION, propagation=propagation_of("sparse", "dense", statistics)
    )
    windows = layer_windows(chain.passes.decoder.model, by="half")
    for position, window in enumerate(windows[:4]):
        chain.dense_pass(window)
        change(window.own_parameters(), seed=position)
        if position == 3:
            break
        chain.advance(window)
    assert chain.dense and chain.sparse and chain.sparse.aside_STD is not None
    assert (chain.dense.states_STD - chain.sparse.states_STD).abs().max() > 0.1, "the chains have come apart"
    perfect_STD = chain.targets_STD + chain.sparse.aside_STD
    chain.dense.step("second", chain._outputs_STD, chain.passes.each_batch)
    assert_close(perfect_STD, chain.dense.states_STD, "behind the layer")


@torch.no_grad()
@pytest.mark.parametrize("propagation", VALID, ids=" ".join)
def test_padding_changes_no_input_or_target_where_there_is_text(
    propagation: tuple[str, str, str], padded_ST: Tensor
) -> None:
    model = tiny_model("llama")
    chain = chain_of(model, padded_ST, CALIBRATION, propagation=propagation_of(*propagation))
    alone = [
        chain_of(model, padded_ST[row : row + 1, :length], 1, propagation=propagation_of(*propagation))
        for row, length in enumerate(LENGTHS)
    ]
    for position, window in enumerate(layer_windows(model)):
        for one in (chain, *alone):
            one.dense_pass(window)
        for row, (one, length) in enumerate(zip(alone, LENGTHS, strict=True)):
            assert_close(chain.inputs_STD[row, :length], one.inputs_STD[0], "inputs")
            assert_close(chain.targets_STD[row, :length], one.targets_STD[0], "targets")
        change(window.own_parameters(), seed=position)
        for one in (chain, *alone):
            one.advance(window)


@torch.no_grad()
@pytest.mark.parametrize("shape", PADDED)
def test_padding_counts_neither_in_unit_nor_in_error_nor_in_loss(shape: str, padded_ST: Tensor) -> None:
    model = tiny_model(shape)
    first, window, *_ = layer_windows(model, verify(model, padded_ST))
    chain = chain_of(model, padded_ST, CALIBRATION)
    chain.dense_pass(first)
    chain.advance(first)
    chain.dense_pass(window)
    data = Activations.from_chain(chain)
    inputs, targets, outputs = [], [], []
    decoder = Decoder(model, CPU.device)
    for row, length in enumerate(LENGTHS):
        tokens_BT = padded_ST[row : row + 1, :length]
        hidden_BTD, calls = decoder.embed(tokens_BT)
        inputs.append(call_layer(decoder.layers[0], hidden_BTD, calls[0]))
        targets.append(call_layer(decoder.layers[1], inputs[-1], calls[1])[0])
    change(window.own_parameters(), seed=1)
    for row, length in enumerate(LENGTHS):
        calls = decoder.embed(padded_ST[row : row + 1, :length])[1]
        outputs.append(call_layer(decoder.layers[1], inputs[row], calls[1])[0])
    squares, energies = (
        [(one - other).square().mean(-1) for one, other in zip(these, targets, strict=True)]
        for these in (outputs, [hidden_BTD[0] for hidden_BTD in inputs])
    )

    unit = torch.cat(energies[:CALIBRATION]).median().item()
    assert data.unit() == pytest.approx(unit, rel=1e-5)
    for errors, expected in zip(data.errors(window, unit), (squares[:2], squares[CALIBRATION:]), strict=True):
        of_tokens_N = torch.cat(expected) / unit
        assert errors == pytest.approx((of_tokens_N.mean().item(), of_tokens_N.median().item()), rel=1e-4)
    trained = module(loss=mean_squared)(window, {}, unit)
    trained.log = lambda *_, **__: None
    for rows in ([0, 1], [1, 2], [0, 2], [0]):
        batch = data.batch(torch.tensor(rows), CPU.device)
        loss = trained.training_step(batch, 0) / batch.weight
        expected_loss = torch.cat([squares[row] for row in rows]).mean() / unit
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)


@pytest.mark.parametrize("shape", PADDED)
def test_gradients_of_a_padded_batch_are_those_of_its_text(shape: str, padded_ST: Tensor) -> None:
    model = tiny_model(shape)  # beyond a sliding window behind the text, pads see nothing at all
    window = layer_windows(model)[0]
    chain = chain_of(model, padded_ST, CALIBRATION)
    chain.dense_pass(window)
    change(window.own_parameters(), seed=1)
    data = Activations.from_chain(chain)
    window.requires_grad_(True)
    trained = module(loss=mean_squared)(window, {}, 1.0)
    trained.log = lambda *_, **__: None
    batch = data.batch(torch.tensor([1, 2]), CPU.device)
    loss = trained.training_step(batch, 0) / batch.weight
    gradients = torch.autograd.grad(loss, window.own_parameters())
    errors = []
    for row in (1, 2):
        length = LENGTHS[row]
        calls = chain.passes.decoder.embed(padded_ST[row : row + 1, :length])[1]
        outputs_BTD = window(data.inputs_STD[row : row + 1, :length], calls)
        errors.append((outputs_BTD - data.targets_STD[row : row + 1, :length]).square().flatten())
    expected = torch.autograd.grad(torch.cat(errors).mean(), window.own_parameters())
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def resumed(walk: Walk, tokens_ST: Tensor, propagation: Propagation, **settings: Any) -> Walk:
    """Another walk at the same window, as after an interruption."""
    arrays = {name: array.clone() for name, array in walk.chain.state().items()}
    other = copy.copy(walk)
    other.model, other.windows = copy.deepcopy((walk.model, walk.windows))
    other.chain = chain_in(other.model, tokens_ST, propagation, **settings)
    other.chain.restore(arrays)
    return other


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("case", "propagation"), each("blocks", "overlapping blocks", "parallel halves"), ids=title_of)
def test_a_restored_chain_goes_on_bit_for_bit(
    case: str, propagation: Propagation, padded: bool, tokens_ST: Tensor, tmp_path: Path
) -> None:
    if padded:
        tokens_ST = tokens_ST.where(torch.arange(LENGTH) < torch.tensor([12, 5, 9, 12, 7])[:, None], PADDING)
    stores = {"store": DiskStore(tmp_path / "one")}, {"store": DiskStore(tmp_path / "other")}
    walk = Walk(case, tokens_ST, propagation, **stores[0])
    stop = 1 if "blocks" in case else 3  # between halves
    for position in range(stop):
        walk.start(position)
        walk.end(position)
    other = resumed(walk, tokens_ST, propagation, **stores[1])
    for position in range(stop, len(walk.windows)):
        expected, found = walk.start(position), other.start(position)
        assert torch.equal(found.inputs_STD, expected.inputs_STD)
        assert torch.equal(found.targets_STD, expected.targets_STD)
        assert found.unit() == expected.unit()
        behind, expected_behind = other.end(position), walk.end(position)
        assert set(behind) == set(expected_behind)
        assert all(torch.equal(behind[name], expected_behind[name]) for name in behind)
