"""Targets that are recomputed for each batch are the kept ones."""

import gc

import pytest
import torch
from conftest import CPU
from torch import Tensor
from walks import CASES, LENGTH, PROPAGATIONS, SAMPLES, Walk, batches, each, name_of, off, title_of

from lit_recon.activations.propagation import Propagation
from lit_recon.activations.teacher import check_halves
from lit_recon.data.packing import PADDING


@pytest.fixture
def tokens_ST() -> Tensor:
    """Three calibration and two held-out samples: not a multiple of the batch of two."""
    return torch.randint(3, 64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize(("case", "propagation"), each(*CASES), ids=title_of)
def test_recomputed_targets_are_the_kept_ones(case: str, propagation: Propagation, tokens_ST: Tensor) -> None:
    kept, made = Walk(case, tokens_ST, propagation), Walk(case, tokens_ST, propagation, recompute=True)
    if case.startswith("parallel") and propagation.corrects:
        with pytest.raises(ValueError, match=r"store\.targets=recompute with windows=half and chain\.inputs=.*keep"):
            check_halves(made.windows, propagation, recompute=True)
        return
    check_halves(made.windows, propagation, recompute=True)
    for position, window in enumerate(made.windows):
        expected, found = kept.start(position), made.start(position)
        trained = [parameter.clone() for parameter in window.parameters()]
        for pair, expected_pair in zip(batches(found), batches(expected), strict=True):
            assert torch.equal(pair[0], expected_pair[0]) and torch.equal(pair[1], expected_pair[1])
        for rows in ([2, 0], [1]):
            batch = found.batch(torch.tensor(rows), CPU.device)
            assert off(batch.targets_BTD, expected.targets_STD[rows]) < 1e-6
        assert found.unit() == pytest.approx(expected.unit(), rel=1e-9)
        errors, expected_errors = (
            one.errors(walk.windows[position], 1.0) for one, walk in ((found, made), (expected, kept))
        )
        for one, other in zip(errors, expected_errors, strict=True):
            assert one == pytest.approx(other, rel=1e-6) and min(one) > 1e-6
        assert all(torch.equal(*pair) for pair in zip(trained, window.parameters(), strict=True))
        behind, expected_behind = made.end(position), kept.end(position)
        assert all(torch.equal(behind[name], expected_behind[name]) for name in expected_behind)
        assert made.chain.teacher is None
    assert set(behind) == set(expected_behind)


@torch.no_grad()
@pytest.mark.parametrize("propagation", PROPAGATIONS, ids=name_of)
def test_recomputed_targets_of_padded_samples_are_the_kept_ones_where_there_is_text(
    propagation: Propagation, tokens_ST: Tensor
) -> None:
    lengths = [12, 5, 9, 12, 7]
    tokens_ST = tokens_ST.where(torch.arange(LENGTH) < torch.tensor(lengths)[:, None], PADDING)
    kept, made = Walk("blocks", tokens_ST, propagation), Walk("blocks", tokens_ST, propagation, recompute=True)
    for position in range(len(kept.windows)):
        expected, found = kept.start(position), made.start(position)
        batch = found.batch(torch.tensor([1, 2]), CPU.device)
        rows_ND = torch.cat([expected.targets_STD[1, :5], expected.targets_STD[2, :9]])
        assert off(batch.text(batch.targets_BTD), rows_ND) < 1e-6
        assert found.unit() == pytest.approx(expected.unit(), rel=1e-6)
        kept.end(position)
        made.end(position)


def test_the_dense_weights_are_freed_behind_the_window(tokens_ST: Tensor) -> None:
    walk = Walk("blocks", tokens_ST, Propagation(inputs="dense"), recompute=True)
    counts = []
    for position in range(3):
        walk.start(position)
        walk.end(position)
        gc.collect()
        counts.append(sum(type(one) is Tensor for one in gc.get_objects()))
    assert counts[0] == counts[1] == counts[2]
