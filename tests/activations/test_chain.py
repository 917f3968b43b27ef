"""What windows are trained on, towards what, and what statistics see: compared with windows run by hand."""

import copy
import gc
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from conftest import CPU, EVERY_SHAPE, chain_of, module, pairs, title
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_recon.activations import propagation as propagation_file
from lit_recon.activations.chain import Chain
from lit_recon.activations.datamodule import Activations
from lit_recon.activations.propagation import Propagation
from lit_recon.data.packing import PADDING
from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import Decoder, call_layer
from lit_recon.model.head import Head
from lit_recon.model.partition import layer_windows
from lit_recon.model.products import observing_products
from lit_recon.model.verify import verify
from lit_recon.model.windows import Window
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.statistics import Statistics

CALIBRATION, SAMPLES, LENGTH = 3, 5, 12
CHOICES = list(itertools.product(("dense", "sparse", "mix"), ("dense", "local"), ("dense", "sparse")))
VALID = [choice for choice in CHOICES if choice[:2] != ("dense", "local")]
TABLE = {  # inputs, targets, statistics: memory, passes; from the README
    ("dense", "dense", "dense"): (2, 1),
    ("dense", "dense", "sparse"): (3, 3),
    ("sparse", "dense", "dense"): (3, 2),
    ("sparse", "dense", "sparse"): (3, 3),
    ("sparse", "local", "dense"): (4, 3),
    ("sparse", "local", "sparse"): (2, 2),
    ("mix", "dense", "dense"): (4, 2),
    ("mix", "dense", "sparse"): (4, 3),
    ("mix", "local", "dense"): (5, 3),
    ("mix", "local", "sparse"): (5, 4),
}
SHARE = 0.3  # of the dense chain in mixed inputs


@pytest.fixture
def tokens_ST() -> Tensor:
    """Three calibration and two held-out samples: not a multiple of the batch of two."""
    return torch.randint(3, 64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


def propagation_of(inputs: str, targets: str, statistics: str) -> Propagation:
    """A propagation with an uneven mix."""
    return Propagation(inputs=inputs, targets=targets, statistics=statistics, mix=SHARE)


def assert_close(values: Tensor, expected: Tensor, what: str) -> None:
    """Equal but for the order of sums."""
    assert values.shape == expected.shape, f"{what}: {values.shape}, expected {expected.shape}"
    worst = (values - expected).abs().max() / expected.abs().max()
    assert worst <= 1e-5, f"{what}: off by {worst:.1e}"


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


@torch.no_grad()
def change(parameters: list[nn.Parameter], seed: int) -> None:
    """Stand in for pruning and reconstruction."""
    for index, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * seed + index)
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


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
        change(window.trained(), seed=position)
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
        change(window.trained(), seed=position)
        if position == 3:
            break
        chain.advance(window)
    assert chain.dense and chain.sparse and chain.sparse.aside_STD is not None
    assert (chain.dense.states_STD - chain.sparse.states_STD).abs().max() > 0.1, "the chains have come apart"
    perfect_STD = chain.targets_STD + chain.sparse.aside_STD
    chain.dense.step("second", chain._outputs_STD, chain.passes.each_batch)
    assert_close(perfect_STD, chain.dense.states_STD, "behind the layer")


@pytest.mark.parametrize("propagation", CHOICES, ids=" ".join)
def test_only_local_targets_of_dense_inputs_are_refused_with_the_reason(propagation: tuple[str, str, str]) -> None:
    if propagation in VALID:
        assert (
            propagation_of(*propagation).inputs,
            propagation_of(*propagation).targets,
            propagation_of(*propagation).statistics,
        ) == propagation
        return
    with pytest.raises(ValueError, match=r"chain\.targets=local with chain\.inputs=dense.*Use chain\.targets=dense"):
        propagation_of(*propagation)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"inputs": "sparce"}, r"chain\.inputs='sparce': expected one of dense, sparse, mix"),
        ({"targets": "mix"}, r"chain\.targets='mix': expected one of dense, local"),
        ({"statistics": "local"}, r"chain\.statistics='local': expected one of dense, sparse"),
        ({"inputs": "mix", "mix": 0}, r"chain\.mix=0: .*use chain\.inputs=sparse or dense"),
        ({"inputs": "mix", "mix": 1.0}, r"chain\.mix=1\.0"),
        ({"mix": "half"}, r"chain\.mix=half"),
    ],
    ids=str,
)
def test_an_unknown_choice_is_refused_with_what_is_expected(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Propagation(**settings)


def test_all_problems_of_a_regime_are_told_at_once() -> None:
    with pytest.raises(ValueError) as refusal:
        Propagation(inputs="x", targets="y", statistics="z", mix=2)
    assert [line.partition("=")[0] for line in str(refusal.value).splitlines()] == [
        "chain.inputs",
        "chain.targets",
        "chain.statistics",
        "chain.mix",
    ]


def documented_table() -> dict[tuple[str, ...], tuple[int, int]]:
    """The table in the docstring of propagation.py."""
    rows = re.findall(r"^ +(\w+) +(\w+) +(\w+) +(\d) +(\d) ", propagation_file.__doc__ or "", re.MULTILINE)
    return {row[:3]: (int(row[3]), int(row[4])) for row in rows}


def test_the_documented_table_has_every_valid_regime() -> None:
    assert documented_table() == TABLE
    assert set(TABLE) == set(VALID)


@pytest.mark.parametrize("propagation", VALID, ids=" ".join)
def test_arrays_and_passes_are_those_of_the_table(propagation: tuple[str, str, str]) -> None:
    made = propagation_of(*propagation)
    assert (made.num_arrays, made.passes) == TABLE[propagation]
    assert made.independent == (propagation == ("dense", "dense", "dense"))


@pytest.mark.parametrize("propagation", VALID, ids=" ".join)
def test_a_window_is_run_as_often_as_the_table_says(propagation: tuple[str, str, str], tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    chain = chain_of(model, tokens_ST, CALIBRATION, propagation=propagation_of(*propagation))
    for window in layer_windows(model):
        samples: list[int] = []
        handle = window.register_forward_pre_hook(lambda _, args, samples=samples: samples.append(len(args[0])))
        chain.dense_pass(window)
        chain.advance(window)
        handle.remove()
        # Sparse statistics alone look at no held-out sample.
        apart = propagation[2] == "sparse" and propagation[:2] != ("sparse", "local")
        assert sum(samples) == TABLE[propagation][1] * SAMPLES - apart * (SAMPLES - CALIBRATION)


@pytest.mark.parametrize("propagation", VALID, ids=" ".join)
def test_as_many_arrays_of_hidden_states_are_there_as_the_table_says(propagation: tuple[str, str, str]) -> None:
    tokens_ST = torch.randint(3, 64, (7, 11), generator=torch.Generator().manual_seed(1))
    model = tiny_model("llama")
    chain = chain_of(model, tokens_ST, 4, propagation=propagation_of(*propagation))
    for window in layer_windows(model):
        chain.dense_pass(window)
        chain.advance(window)
    gc.collect()
    found = {
        tensor.untyped_storage().data_ptr()
        for tensor in gc.get_objects()
        if type(tensor) is Tensor and tuple(tensor.shape) == (7, 11, 32)
    }
    assert len(found) == TABLE[propagation][0]


def padded(tokens_ST: Tensor, lengths: list[int]) -> Tensor:
    """The samples, cut to these lengths."""
    positions_T = torch.arange(tokens_ST.shape[1])
    return tokens_ST.where(positions_T < torch.tensor(lengths)[:, None], PADDING)


LENGTHS = [24, 9, 17, 24, 5]


@pytest.fixture
def padded_ST() -> Tensor:
    """Samples of different lengths, two of them full."""
    return padded(torch.randint(3, 64, (5, 24), generator=torch.Generator().manual_seed(1)), LENGTHS)


@torch.no_grad()
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_replay_with_padding_equals_the_model_with_an_attention_mask(shape: str, padded_ST: Tensor) -> None:
    model = tiny_model(shape)
    decoder = Decoder(model, CPU.device)
    tokens_BT = padded_ST[:3]
    text_BT = tokens_BT != PADDING
    hidden_BTD, calls = decoder.embed(tokens_BT)
    assert torch.equal(decoder.embed(tokens_BT)[0], hidden_BTD)
    for layer, call in zip(decoder.layers, calls, strict=True):
        hidden_BTD = call_layer(layer, hidden_BTD, call)
    ids_BT = tokens_BT.masked_fill(~text_BT, 0)
    expected_BTV = model(ids_BT, attention_mask=text_BT.long(), use_cache=False).logits
    logits_BTV = Head(decoder)(hidden_BTD)
    assert torch.equal(logits_BTV[text_BT], expected_BTV[text_BT])
    for row in range(3):
        alone_BTV = model(tokens_BT[row : row + 1, : LENGTHS[row]], use_cache=False).logits
        assert_close(logits_BTV[row : row + 1, : LENGTHS[row]], alone_BTV, "a sample without its padding")


def test_calls_of_padded_samples_are_those_of_their_own_tokens(padded_ST: Tensor) -> None:
    model = tiny_model("llama")
    decoder = Decoder(model, CPU.device)
    full_ST = padded_ST.where(padded_ST != PADDING, 5)
    for tokens_BT in (full_ST[1:3], padded_ST[1:3], padded_ST[[4, 2]], full_ST[1:3]):
        kept, fresh = decoder.calls(tokens_BT), decoder.embed(tokens_BT)[1]
        for one, other in zip(kept, fresh, strict=True):
            masks = one.kwargs["attention_mask"], other.kwargs["attention_mask"]
            assert masks == (None, None) if None in masks else torch.equal(*masks)


PADDED = ("llama", "gemma2", "bloom", "opt", "mixtral", "gpt_oss", "llama4")


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
        change(window.trained(), seed=position)
        for one in (chain, *alone):
            one.advance(window)


@torch.no_grad()
@pytest.mark.parametrize("shape", PADDED)
def test_padding_counts_neither_in_unit_nor_in_error_nor_in_loss(shape: str, padded_ST: Tensor) -> None:
    model = tiny_model(shape)
    first, window, *_ = layer_windows(model, verify(model, padded_ST))
    chain = chain_of(model, padded_ST, CALIBRATION)
    step(chain, first)
    chain.dense_pass(window)
    data = Activations.from_chain(chain)
    inputs, targets, outputs = [], [], []
    decoder = Decoder(model, CPU.device)
    for row, length in enumerate(LENGTHS):
        tokens_BT = padded_ST[row : row + 1, :length]
        hidden_BTD, calls = decoder.embed(tokens_BT)
        inputs.append(call_layer(decoder.layers[0], hidden_BTD, calls[0]))
        targets.append(call_layer(decoder.layers[1], inputs[-1], calls[1])[0])
    change(window.trained(), seed=1)
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
    trained = module()(window, {}, unit)
    trained.log = lambda *_, **__: None
    for rows in ([0, 1], [1, 2], [0, 2], [0]):
        batch = data.batch(torch.tensor(rows), CPU.device)
        loss = trained.training_step(batch, 0) / batch.weight
        expected_loss = torch.cat([squares[row] for row in rows]).mean() / unit
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)


def step(chain: Chain, window: Window) -> None:
    """Walk over a window that stays as it is."""
    chain.dense_pass(window)
    chain.advance(window)


@pytest.mark.parametrize("shape", PADDED)
def test_gradients_of_a_padded_batch_are_those_of_its_text(shape: str, padded_ST: Tensor) -> None:
    model = tiny_model(shape)  # beyond a sliding window behind the text, pads see nothing at all
    window = layer_windows(model)[0]
    chain = chain_of(model, padded_ST, CALIBRATION)
    chain.dense_pass(window)
    change(window.trained(), seed=1)
    data = Activations.from_chain(chain)
    window.requires_grad_(True)
    trained = module()(window, {}, 1.0)
    trained.log = lambda *_, **__: None
    batch = data.batch(torch.tensor([1, 2]), CPU.device)
    loss = trained.training_step(batch, 0) / batch.weight
    gradients = torch.autograd.grad(loss, window.trained())
    errors = []
    for row in (1, 2):
        length = LENGTHS[row]
        calls = chain.passes.decoder.embed(padded_ST[row : row + 1, :length])[1]
        outputs_BTD = window(data.inputs_STD[row : row + 1, :length], calls)
        errors.append((outputs_BTD - data.targets_STD[row : row + 1, :length]).square().flatten())
    expected = torch.autograd.grad(torch.cat(errors).mean(), window.trained())
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("statistics", ["dense", "sparse"])
@pytest.mark.parametrize("shape", PADDED)
def test_statistics_of_padded_samples_are_those_of_their_text(shape: str, statistics: str, padded_ST: Tensor) -> None:
    model = tiny_model(shape)
    first, window, *_ = layer_windows(model, verify(model, padded_ST))
    propagation = Propagation(statistics=statistics)
    gathered = Statistics(Wanda(), window.matrices())
    chain = chain_of(model, padded_ST, CALIBRATION, propagation=propagation)
    step(chain, first)
    chain.dense_pass(window, [gathered])
    expected = Statistics(Wanda(), window.matrices())
    for row in range(CALIBRATION):  # one by one, without padding
        tokens_ST = padded_ST[row : row + 1, : LENGTHS[row]]
        alone = chain_of(model, tokens_ST, 1, propagation=propagation)
        step(alone, first)
        with observing_products(window.matrices(), expected.note):
            window(alone.inputs_STD, alone.passes.decoder.embed(tokens_ST)[1])
    assert set(gathered.by_name) == set(expected.by_name)
    for name, by_expert in expected.by_name.items():
        assert_close(torch.stack(gathered.by_name[name]), torch.stack(by_expert), name)
    plain = [matrix.name for matrix in window.matrices() if matrix.experts == 1]
    assert {gathered._rows[name][0] for name in plain} == {sum(LENGTHS[:CALIBRATION])}


@torch.no_grad()
def test_statistics_do_not_depend_on_how_samples_are_batched(tokens_ST: Tensor) -> None:
    model, sums = tiny_model("mixtral"), []
    window = layer_windows(model)[0]
    for batch_size in (1, 2, 5):
        gathered = Statistics(Wanda(), window.matrices())
        chain_of(model, tokens_ST, CALIBRATION, batch_size).dense_pass(window, [gathered])
        sums.append({name: torch.stack(by_expert) for name, by_expert in gathered.by_name.items()})
    for other in sums[1:]:
        for name, expected in sums[0].items():
            assert_close(other[name], expected, name)


@torch.no_grad()
def test_layers_of_a_window_can_be_run_in_part(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    (window,) = layer_windows(model, by="model")
    hidden_BTD, calls = Decoder(model, CPU.device).embed(tokens_ST)
    run = partial(window, calls=calls)
    whole_BTD = run(run(hidden_BTD, layers=slice(0, 2)), layers=slice(2, None))
    assert torch.equal(whole_BTD, run(hidden_BTD))
