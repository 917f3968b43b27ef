"""The walk holds nothing of a window longer than it is needed, and tells its callbacks of each window in order."""

import re
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from conftest import CPU, chain_of, fitter, module
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.activations.datamodule import Activations
from lit_recon.activations.gram import GramSums
from lit_recon.activations.matrix_inputs import MatrixInputs
from lit_recon.model.architectures import tiny_model
from lit_recon.model.errors import Errors
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import partition
from lit_recon.model.windows import AnyWindow, MatrixWindow, Window
from lit_recon.modules.least_squares import LeastSquares
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner
from lit_recon.pruning.statistics import Statistics
from lit_recon.reconstruction.driver import WalkCallback, walk
from lit_recon.reconstruction.held_out_errors import HeldOutErrors
from lit_recon.reconstruction.window_result import WindowResult
from lit_recon.system.device import Compute
from lit_recon.system.finite import NotFinite


class Told(WalkCallback):
    """What a callback is told, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.masks: dict[str, Tensor] = {}

    def on_window_fit(self, result: WindowResult) -> None:
        self.events.append(f"fit {result.name}")

    def on_window_end(self, window: Window, masks: Mapping[str, Tensor], results: Sequence[WindowResult]) -> None:
        assert all(parameter.device == CPU.device for parameter in window.parameters())
        self.events.append(f"end {window.name} after {len(results)}")
        self.masks |= masks


def walked(
    tokens_ST: Tensor,
    run: Path,
    callback: WalkCallback,
    model: PreTrainedModel | None = None,
    precision: str = "32-true",
    **settings: object,
) -> list[WindowResult]:
    """A walk over the tiny Llama."""
    model = model or tiny_model("llama")
    chain = chain_of(model, tokens_ST, 4)
    chain.passes.batching.compute = Compute(CPU.device, precision)
    return walk(
        partition(model, **settings),
        chain=chain,
        pruner=Pruner(Wanda(), Unstructured(sparsity=0.5), chain),
        fitter=fitter(run, module(), max_epochs=1),
        weights=WeightOffloader(model, CPU.device),
        callbacks=[callback],
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [f"{what}_{index:02}" for index in range(3) for what in ("fit block", "end block")]),
        ({"by": "blocks", "size": 2, "stride": 1}, ["fit blocks_00_01", "end blocks_00_01"]),
    ],
    ids=["blocks", "overlapping"],
)
def test_callbacks_are_told_of_each_fit_and_then_of_its_window(
    tokens_ST: Tensor, tmp_path: Path, settings: dict, expected: list[str]
) -> None:
    told = Told()
    results = walked(tokens_ST, tmp_path, told, **settings)
    assert [event.partition(" after")[0] for event in told.events][: len(expected)] == expected
    assert told.events[-1].endswith(f"after {len(results)}")
    assert len(told.masks) == 3 * 7, "each matrix once, of overlapping windows where it is kept"


def test_data_of_a_matrix_are_gone_before_those_of_the_next_are_made(
    tokens_ST: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref] = []
    whole = MatrixInputs.activations

    def activations(self: MatrixInputs, window: MatrixWindow) -> object:
        assert all(reference() is None for reference in made), f"{window.name}: data of an earlier matrix are alive"
        data = whole(self, window)
        made.append(weakref.ref(data))
        return data

    monkeypatch.setattr(MatrixInputs, "activations", activations)
    walked(tokens_ST, tmp_path, Told(), by="matrix")
    assert len(made) == 3 * 7


def test_statistics_are_gone_when_a_window_is_fitted(
    tokens_ST: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref] = []
    start = Statistics.__init__

    def init(self: Statistics, *arguments: object) -> None:
        start(self, *arguments)
        made.append(weakref.ref(self))

    class Looking(Told):
        def on_window_fit(self, result: WindowResult) -> None:
            assert made and all(reference() is None for reference in made)

    monkeypatch.setattr(Statistics, "__init__", init)
    walked(tokens_ST, tmp_path, Looking())
    assert len(made) == 3


def test_a_damaged_weight_ends_the_walk_at_its_window_and_is_named(tokens_ST: Tensor, tmp_path: Path) -> None:
    told, model = Told(), tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[2, 3] = float("inf")
    with pytest.raises(NotFinite) as caught:
        walked(tokens_ST, tmp_path, told, model)
    assert told.events == ["fit block_00", "end block_00 after 1"]
    assert re.match(r"block_01: outputs are not finite, first in calibration sample 0, position 0", str(caught.value))
    assert "layers.0.mlp.down_proj.weight of the window is not finite itself" in str(caught.value)


@pytest.mark.parametrize("settings", [{}, {"by": "half"}], ids=str)
def test_what_overflows_float16_names_the_window_and_the_precision(
    tokens_ST: Tensor, tmp_path: Path, settings: dict
) -> None:
    told, model = Told(), tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e9)
    name = "half_01_mlp" if settings else "block_01"
    with pytest.raises(NotFinite, match=rf"^{name}: outputs are not finite, first in calibration sample 0.*16-mixed"):
        walked(tokens_ST, tmp_path, told, model, "16-mixed", **settings)
    assert told.events[-1].startswith("end half_01_attention" if settings else "end block_00")


def test_a_pruned_window_without_a_finite_error_is_named_before_it_is_trained(
    tokens_ST: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    monkeypatch.setattr(HeldOutErrors, "now", lambda _: Errors(float("nan"), 0.1))
    with pytest.raises(NotFinite, match="^block_00: its error on held-out samples, pruned, is not finite.*16-mixed"):
        walked(tokens_ST, tmp_path, told, precision="16-mixed")
    assert told.events == []


def test_sums_of_inputs_that_overflow_name_their_matrix(
    tokens_ST: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = GramSums.add

    def overflow(self: GramSums, rows_NI: Tensor) -> None:
        add(self, rows_NI)
        self.gram_II.fill_(float("inf"))

    monkeypatch.setattr(GramSums, "add", overflow)
    chain = chain_of(model := tiny_model("llama"), tokens_ST, 4)
    with pytest.raises(
        NotFinite, match=r"^block_00\.self_attn\.q_proj: its error on calibration samples, pruned, is not finite"
    ):
        walk(
            partition(model, by="matrix"),
            chain=chain,
            pruner=Pruner(Wanda(), Unstructured(sparsity=0.5), chain),
            fitter=fitter(tmp_path, LeastSquares),
            weights=WeightOffloader(model, CPU.device),
        )


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [(torch.bfloat16, {}), (torch.float16, {}), (torch.bfloat16, {"by": "half"}), (torch.bfloat16, {"by": "matrix"})],
    ids=str,
)
def test_the_errors_of_a_window_are_those_of_the_weights_that_are_stored(
    tokens_ST: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, settings: dict
) -> None:
    measured: list[bool] = []

    class Measuring(Told):
        def on_window_fit(self, result: WindowResult) -> None:
            window, data, unit = last
            for parameter in window.own_parameters():
                parameter.data.copy_(parameter.data.to(dtype))
            assert (result.held_out_after, result.typical_after) == data.held_out_errors(window, unit)
            measured.append(result.accepted)

    errors = Activations.calibration_errors

    def keep(self: Activations, window: AnyWindow, unit: float) -> Errors:
        nonlocal last
        last = window, self, unit
        return errors(self, window, unit)

    last: tuple = ()
    monkeypatch.setattr(Activations, "calibration_errors", keep)
    walked(tokens_ST, tmp_path, Measuring(), tiny_model("llama").to(dtype), **settings)
    assert len(measured) in (3, 6, 21) and sum(measured) > 0.7 * len(measured)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({"by": "matrix", "match": r"\.1\..*k_proj|up_proj"}, ["block_00.mlp.up_proj", "block_01.self_attn.k_proj"]),
        ({"by": "block", "match": "_0[02]"}, ["block_00", "block_02"]),
    ],
    ids=["matrices", "blocks"],
)
def test_windows_that_are_not_chosen_are_pruned_only(
    tokens_ST: Tensor, tmp_path: Path, settings: dict, chosen: list[str]
) -> None:
    model, told = tiny_model("llama"), Told()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    results = walked(tokens_ST, tmp_path, told, model, **settings)
    assert len(results) == (3 if settings["by"] == "block" else 21)
    assert [one.name for one in results if one.measured][:2] == chosen
    for one in results:
        assert one.accepted == one.measured
        assert one.measured or one.note == "left out by windows.match or windows.skip: kept its pruned weights"
    for name, mask in told.masks.items():
        kept = model.get_parameter(name)
        assert not kept[~mask].any(), "all of them are pruned"
        window = name.removeprefix("model.layers.").removesuffix(".weight")
        window = f"block_0{window}" if settings["by"] == "matrix" else f"block_0{window[0]}"
        measured = next(one.measured for one in results if one.name == window)
        assert torch.equal(kept[mask], before[name][mask]) != measured, name
