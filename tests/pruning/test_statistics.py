"""Statistics are of the text of calibration samples, for each expert by itself, however samples are batched."""

import pytest
import torch
from conftest import LENGTHS, PADDED, assert_close, chain_of
from torch import Tensor

from lit_recon.activations.chain import Chain
from lit_recon.activations.propagation import Propagation
from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import layer_windows
from lit_recon.model.products import observing_products
from lit_recon.model.verify import verify
from lit_recon.model.windows import Window
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.statistics import Statistics

CALIBRATION = 3


def step(chain: Chain, window: Window) -> None:
    """Walk over a window that stays as it is."""
    chain.dense_pass(window)
    chain.advance(window)


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


def test_statistics_are_kept_by_expert() -> None:
    class Counting(Magnitude):
        def start(self, weight_OI: Tensor) -> int:
            return 0

        def update(self, statistics: int, inputs_NI: Tensor) -> int:
            return statistics + len(inputs_NI)

    model = tiny_model("mixtral")
    criterion: Criterion = Counting()
    tokens_ST = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(2))
    window = layer_windows(model)[0]
    statistics = Statistics(criterion, window.matrices())
    chain: Chain = chain_of(model, tokens_ST, 4)
    chain.dense_pass(window, [statistics])
    for name, counts in statistics.by_name.items():
        assert sum(counts) == 4 * 24 * (2 if "experts" in name else 1), name
        assert len(counts) == (4 if "experts" in name else 1)
