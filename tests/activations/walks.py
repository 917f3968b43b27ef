"""Walks over tiny models, one window at a time, that tests of activations compare."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from conftest import chain_of, pairs
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_recon.activations.chain import Chain
from lit_recon.activations.datamodule import Activations
from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import MemoryStore
from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import layer_windows

CALIBRATION, SAMPLES, LENGTH = 3, 5, 12
CHOICES = list(itertools.product(("dense", "sparse", "mix"), ("dense", "local"), ("dense", "sparse")))
VALID = [choice for choice in CHOICES if choice[:2] != ("dense", "local")]
SHARE = 0.3  # of the dense chain in mixed inputs
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "blocks": ("llama", {"by": "block"}),
    "overlapping blocks": ("llama", {"by": "blocks", "size": 2, "stride": 1}),
    "sequential halves": ("llama", {"by": "half"}),
    "parallel halves": ("gpt_neox", {"by": "half"}),
    "parallel halves with a shared norm": ("phi", {"by": "half"}),
}
EXACTING = ("overlapping blocks", "parallel halves with a shared norm")  # the other cases do less


def propagation_of(inputs: str, targets: str, statistics: str) -> Propagation:
    """A propagation with an uneven mix."""
    return Propagation(inputs=inputs, targets=targets, statistics=statistics, mix=SHARE)


PROPAGATIONS = [propagation_of(*choice) for choice in VALID]


def name_of(propagation: Propagation) -> str:
    return f"{propagation.inputs} {propagation.targets} {propagation.statistics}"


def title_of(value: str | Propagation) -> str:
    return value if isinstance(value, str) else name_of(value)


def each(*cases: str) -> list:
    """These cases with each propagation; by default the exacting ones, and all with the fewest chains and with two."""
    return pairs(cases, PROPAGATIONS, EXACTING, (PROPAGATIONS[0], PROPAGATIONS[3]))


def chain_in(
    model: PreTrainedModel, tokens_ST: Tensor, propagation: Propagation | None = None, **settings: Any
) -> Chain:
    """A chain at the model's first layer, whose store and way of making targets are `settings`."""
    return chain_of(model, tokens_ST, CALIBRATION, propagation=propagation, **settings)


@torch.no_grad()
def change(parameters: Sequence[nn.Parameter], seed: int) -> None:
    """Stand in for pruning and reconstruction."""
    for index, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * seed + index)
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


class Walk:
    """A walk over a model of its own, one window at a time."""

    def __init__(self, case: str, tokens_ST: Tensor, propagation: Propagation, **settings: Any) -> None:
        shape, cut = CASES[case]
        self.model = tiny_model(shape)
        self.windows = layer_windows(self.model, **cut)
        self.chain = chain_in(self.model, tokens_ST, propagation, **settings)

    def start(self, position: int) -> Activations:
        """The activations of a window, which is changed by now."""
        window = self.windows[position]
        self.chain.dense_pass(window)
        self.passed_on = [parameter.clone() for parameter in window.shared_with_next()]
        change(window.own_parameters(), seed=position)
        return Activations.from_chain(self.chain)

    @torch.no_grad()
    def end(self, position: int) -> dict[str, Tensor]:
        """The state behind a window; layers that are not kept are what they were."""
        window = self.windows[position]
        for parameter, value in zip(window.shared_with_next(), self.passed_on, strict=True):
            parameter.copy_(value)
        self.chain.advance(window)
        return self.chain.state()


def batches(data: Activations) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets as the chain batches its samples."""
    parts = [*data.batches(0, CALIBRATION), *data.batches(CALIBRATION, SAMPLES)]
    return [(batch.inputs_BTD, batch.targets_BTD) for batch in parts]


def off(values: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative."""
    values, expected = values.double(), expected.double()
    return ((values - expected).square().mean() / expected.square().mean()).sqrt().item()


class WatchedStore(MemoryStore):
    """A store that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, list[int]]] = []

    def _tell(self, what: str, rows: slice | Sequence[int]) -> None:
        chosen = list(range(SAMPLES))[rows] if isinstance(rows, slice) else list(rows)
        if chosen:
            self.told.append((what, chosen))

    def prefetch(self, array_STD: Tensor, rows: slice | Sequence[int]) -> None:
        self._tell("prefetch", rows)

    def release(self, array_STD: Tensor, rows: slice | Sequence[int]) -> None:
        self._tell("release", rows)
