"""Least squares as a window's start: solved on the support, trained from there, kept where training fails."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import CPU, chain_of, masks_of, module, trainer
from lightning import LightningModule
from torch import Tensor

from lit_recon.activations.propagation import Propagation
from lit_recon.activations.window_grams import WindowGrams
from lit_recon.model.architectures import tiny_model
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import partition
from lit_recon.model.products import observing_products
from lit_recon.modules.losses import mean_squared
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.modules.untrained import Untrained
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner
from lit_recon.reconstruction.driver import walk
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.reconstruction.start import solutions
from lit_recon.reconstruction.window_fit import WindowFitter
from lit_recon.reconstruction.window_result import WindowResult

MANY_ST = torch.randint(3, 64, (36, 24), generator=torch.Generator().manual_seed(1))


def walked(make: Callable[..., LightningModule], *, by: str, start: str, inputs: str = "dense") -> list[WindowResult]:
    """Results of a tiny model's windows."""
    model = tiny_model("gpt2")
    chain = chain_of(model, MANY_ST, 32, propagation=Propagation(inputs=inputs))
    settings = FitSettings(start=start, retry_rates=())
    results = walk(
        partition(model, by=by)[: 4 if by == "matrix" else 2],
        chain=chain,
        pruner=Pruner(Magnitude(), Unstructured(sparsity=0.5), chain),
        fitter=WindowFitter(make, trainer(), device=CPU.device, seed=0, fitting=settings),
        weights=WeightOffloader(model, CPU.device),
    )
    for matrix in partition(model)[0].matrices():
        assert torch.count_nonzero(matrix.weight) == 0.5 * matrix.weight.numel(), "sparsity is exact"
    return results


def test_solutions_are_those_of_least_squares_on_what_each_matrix_is_multiplied_by() -> None:
    model = tiny_model("gpt2")
    chain = chain_of(model, MANY_ST, 32)
    window = partition(model)[0]
    rows: dict[str, list[Tensor]] = {}
    calls = chain.passes.batching.calls(torch.arange(32))
    with observing_products(window.matrices(), lambda one: rows.setdefault(one.matrix.name, []).append(one.rows_NI)):
        window(chain.inputs_STD[:32], calls)
    masks = masks_of(Pruner(Magnitude(), Unstructured(sparsity=0.5), chain), window)
    grams = WindowGrams(window.matrices())
    chain.dense_pass(window, [grams])
    found = solutions(window, masks, grams)
    for matrix in window.matrices():
        inputs_NI = torch.cat(rows[matrix.name]).double().numpy()
        dense_OI, mask_OI, found_OI = (
            matrix.by_expert(one.detach())[0].numpy() for one in (matrix.weight, masks[matrix.name], found[matrix.name])
        )
        assert not found_OI[~mask_OI].any()
        energy_I = np.square(inputs_NI).sum(0)
        for output in (0, 5):  # the damped problem as rows of an ordinary one
            kept = mask_OI[output]
            pull = np.diag(np.sqrt(0.1 * energy_I[kept]))
            rows_of = np.vstack([inputs_NI[:, kept], pull])
            targets = np.concatenate([inputs_NI @ dense_OI[output], pull @ dense_OI[output][kept]])
            best = np.linalg.lstsq(rows_of, targets, rcond=None)[0]
            at_start, at_found, at_best = (
                np.square(rows_of @ one - targets).sum()
                for one in (dense_OI[output][kept], found_OI[output][kept], best)
            )
            assert at_start - at_found >= 0.998 * (at_start - at_best) > 0, matrix.name


@pytest.mark.parametrize(
    ("by", "inputs"), [("block", "dense"), ("half", "sparse"), ("matrix", "dense"), ("model", "dense")]
)
def test_a_start_is_better_than_pruned_without_training_and_training_goes_on_from_it(by: str, inputs: str) -> None:
    solved = walked(Untrained, by=by, start="least_squares", inputs=inputs)[0]
    assert solved.accepted and solved.steps == 0 and solved.rate == 0
    assert solved.held_out_after < 0.97 * solved.held_out_before
    assert solved.note == "nothing of it is trained: kept its least-squares solution"
    trained = walked(module(lr=1e-3, loss=mean_squared), by=by, start="least_squares", inputs=inputs)[0]
    assert trained.held_out_before == solved.held_out_before
    assert trained.tries[0] == [0.0, solved.held_out_after, solved.typical_after]
    if by == "matrix":  # of one matrix the solution is nearly the best there is
        assert trained.held_out_after <= solved.held_out_after
    else:
        assert trained.held_out_after < solved.held_out_after and trained.steps > 0


class Worsening(MaskedWeights):
    """Goes up."""

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        return -super().training_step(batch, batch_idx)


def test_where_training_only_makes_it_worse_the_solution_is_kept() -> None:
    solved = walked(Untrained, by="block", start="least_squares")[0]
    kept = walked(module(cls=Worsening), by="block", start="least_squares")[0]
    assert kept.accepted and kept.rate == 0 and kept.steps == 0
    assert kept.held_out_after == solved.held_out_after
    assert kept.note.endswith("kept its least-squares solution") and "did not improve" in kept.note


def test_a_solution_that_is_not_better_is_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = lambda window, masks, grams: {one.name: 2 * one.weight * masks[one.name] for one in window.matrices()}  # noqa: E731
    monkeypatch.setattr("lit_recon.reconstruction.window_fit.solutions", bad)
    found, without = (walked(module(lr=1e-3), by="block", start=start)[0] for start in ("least_squares", "none"))
    assert found.held_out_after == without.held_out_after and found.tries == without.tries
    assert found.note.startswith("its least-squares solution was not better (")
