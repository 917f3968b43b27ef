"""Energies of dense updates, gathered in the dense pass, are those of each token by hand: the unit of all errors."""

import pytest
import torch
from conftest import CPU
from torch import Tensor
from walks import CALIBRATION, LENGTH, SAMPLES, Walk, chain_in, each, name_of, propagation_of, title_of

from lit_recon.activations.gram import SAMPLED, GramSums, NormalEquations, PairedSums
from lit_recon.activations.matrix_inputs import MatrixInputs
from lit_recon.activations.propagation import Propagation
from lit_recon.data.packing import PADDING
from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import partition

LENGTHS = [12, 5, 9, 12, 7]
KEPT = [propagation_of(*choice) for choice in (("dense", "dense", "dense"), ("sparse", "local", "dense"))]


@pytest.fixture
def tokens_ST() -> Tensor:
    """Random tokens of all samples."""
    return torch.randint(3, 64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_hand(walk: Walk, position: int) -> Tensor:
    """(output - input)^2 of each token, a mean over features, of the window where it starts; (S, T)."""
    chain, window = walk.chain, walk.windows[position]
    starts_STD = chain.inputs_STD if chain.propagation.targets == "local" else chain.dense.states_STD
    if chain.propagation.targets == "local" and chain.propagation.inputs == "mix":
        starts_STD = (
            chain.propagation.mix * chain.dense.states_STD + (1 - chain.propagation.mix) * chain.sparse.states_STD
        )
    with window.with_dense_norms():
        outputs_STD = window(starts_STD, chain.passes.batching.calls(torch.arange(SAMPLES)))
    return (outputs_STD - starts_STD).square().mean(-1)


@pytest.mark.parametrize(
    ("case", "propagation"),
    each("blocks", "overlapping blocks", "sequential halves", "parallel halves", "parallel halves with a shared norm"),
    ids=title_of,
)
def test_energies_are_those_of_the_whole_dense_window_from_where_its_targets_start(
    case: str, propagation: Propagation, tokens_ST: Tensor
) -> None:
    walk = Walk(case, tokens_ST, propagation)
    for position in range(len(walk.windows)):
        expected_ST = by_hand(walk, position)
        data = walk.start(position)
        torch.testing.assert_close(data.energies_ST, expected_ST, rtol=1e-4, atol=1e-7)
        batch = data.batch(torch.tensor([4, 1]), CPU.device)
        torch.testing.assert_close(batch.energies_BT, expected_ST[[4, 1]], rtol=1e-4, atol=1e-7)
        assert data.unit() == pytest.approx(expected_ST[:CALIBRATION].median().item(), rel=1e-4)
        walk.end(position)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("propagation", KEPT, ids=name_of)
def test_padding_has_no_energy_and_recomputed_targets_have_that_of_the_kept_ones(
    propagation: Propagation, recompute: bool, tokens_ST: Tensor
) -> None:
    tokens_ST = tokens_ST.where(torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None], PADDING)
    walk = Walk("blocks", tokens_ST, propagation, recompute=recompute)
    for position in range(len(walk.windows)):
        expected_ST = by_hand(walk, position)
        data = walk.start(position)
        for rows in ([0, 1], [2, 4]):
            batch = data.batch(torch.tensor(rows), CPU.device)
            expected = torch.cat([expected_ST[row, : LENGTHS[row]] for row in rows])
            torch.testing.assert_close(batch.text(batch.energies_BT), expected, rtol=1e-4, atol=1e-7)
        if not recompute:
            assert all(not data.energies_ST[row, length:].any() for row, length in enumerate(LENGTHS))
        calibration = torch.cat([expected_ST[row, : LENGTHS[row]] for row in range(CALIBRATION)])
        assert data.unit() == pytest.approx(calibration.median().item(), rel=1e-4)
        walk.end(position)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["llama", "mixtral"])
def test_the_energy_of_a_matrix_is_that_of_its_products(shape: str, tokens_ST: Tensor) -> None:
    model = tiny_model(shape)
    windows = [window for window in partition(model, by="matrix") if window.name.startswith("block_00")]
    chain, layer = chain_in(model, tokens_ST), windows[0].enclosing
    chain.dense_pass(layer)
    inputs = MatrixInputs(layer, chain)
    assert {window.matrix.experts > 1 for window in windows} == ({True, False} if shape == "mixtral" else {False})
    for window in windows:
        data = inputs.activations(window)
        weight_EOI = window.matrix.by_expert(window.matrix.weight)
        (expert_ST,) = [call.kwargs["experts"] for call in data.batching.calls(torch.arange(len(data.inputs_STD)))] or [
            torch.zeros(data.inputs_STD.shape[:2], dtype=torch.long)
        ]
        products_STO = torch.einsum("stoi,sti->sto", weight_EOI[expert_ST], data.inputs_STD)
        valid_ST = data.batching.valid_ST
        valid_ST = torch.ones_like(expert_ST, dtype=torch.bool) if valid_ST is None else valid_ST
        expected_ST = products_STO.square().mean(-1)
        torch.testing.assert_close(data.energies_ST[valid_ST], expected_ST[valid_ST], rtol=1e-4, atol=1e-8)
        mine = expected_ST[: data.batching.num_samples][valid_ST[: data.batching.num_samples]]
        assert data.unit() == pytest.approx(mine.median().item(), rel=1e-4)


def gathered(rows_NI: Tensor, size: int) -> NormalEquations:
    """The normal equations of a matrix whose weights are halved after its targets were made, of rows in batches."""
    window = partition(tiny_model("llama"), by="matrix")[0]
    window.open()
    sums = GramSums.zero(rows_NI.shape[1], CPU.device)
    for batch_NI in rows_NI.split(size):
        sums.add(batch_NI)
    return NormalEquations.from_sums(window, *[[PairedSums.of_one(sums)]] * 2)


@pytest.mark.parametrize(
    ("rows", "size", "tolerance"), [(SAMPLED, 64, 1e-5), (40, 7, 1e-5), (20000, 512, 0.1), (5000, 5000, 0.4)], ids=str
)
def test_medians_of_normal_equations_are_those_of_all_rows_or_near_them(rows: int, size: int, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows_NI = torch.randn(rows, 32, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    window = partition(tiny_model("llama"), by="matrix")[0]
    weight_OI = window.matrix.weight.detach()
    equations = gathered(rows_NI, size)
    energies_N = (rows_NI @ weight_OI.T).square().mean(-1)
    assert equations.unit() == pytest.approx(energies_N.median().item(), rel=tolerance)
    errors = equations.calibration.errors(0.5 * weight_OI[None], 2.0)
    assert errors.typical == pytest.approx(energies_N.median().item() / 4 / 2, rel=tolerance)
    assert errors.mean == pytest.approx(energies_N.mean().item() / 4 / 2, rel=1e-4), "of all rows"
    kept = sum(len(inputs_NI) for inputs_NI, _ in equations.calibration.sampled)
    assert kept == min(rows, kept) <= SAMPLED
