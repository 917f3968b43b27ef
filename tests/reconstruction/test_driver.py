"""The walk holds nothing of a window longer than it is needed, and tells its callbacks of each window in order."""

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from conftest import CPU, chain_of, fitter, module
from torch import Tensor

from lit_recon.activations.matrix_inputs import MatrixInputs
from lit_recon.model.architectures import tiny_model
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import partition
from lit_recon.model.windows import MatrixWindow, Window
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner
from lit_recon.pruning.statistics import Statistics
from lit_recon.reconstruction.driver import WalkCallback, walk
from lit_recon.reconstruction.window_fit import WindowResult


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


def walked(tokens_ST: Tensor, run: Path, callback: WalkCallback, **settings: object) -> list[WindowResult]:
    """A walk over the tiny Llama."""
    model = tiny_model("llama")
    chain = chain_of(model, tokens_ST, 4)
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
