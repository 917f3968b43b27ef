"""DSnoT exchanges what its equations say, row by row, keeps counts, and never raises the expected error."""

import pytest
import torch
from torch import Tensor

from lit_recon.pruning.refine.dsnot import DSnoT


def drawn(seed: int, outputs: int = 6, inputs: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a mask of half of each group of four, and inputs whose means are not zero."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    inputs_NI = torch.randn(50, inputs, generator=generator) + torch.randn(inputs, generator=generator)
    order = torch.rand(outputs, inputs // 4, 4, generator=generator).argsort(-1)
    return weight_OI, (order < 2).flatten(1), inputs_NI


def gathered(refinement: DSnoT, weight_OI: Tensor, inputs_NI: Tensor) -> Tensor:
    statistics = refinement.start(weight_OI)
    for batch_NI in inputs_NI.split(7):
        statistics = refinement.update(statistics, batch_NI)
    return statistics


def by_hand(
    weight: list[float], kept: list[bool], inputs_NI: Tensor, cycles: int, threshold: float, width: int
) -> list:
    """The equations, for one row, with plain numbers."""
    mean, variance = inputs_NI.double().mean(0).tolist(), inputs_NI.double().var(0, correction=0).tolist()
    norm, kept = inputs_NI.double().norm(dim=0).tolist(), list(kept)
    error = sum(w * m for w, m, k in zip(weight, mean, kept, strict=True) if not k)
    for _ in range(cycles):
        if abs(error) <= threshold:
            break
        sign, best = (1 if error > 0 else -1), None
        for start in range(0, len(weight), width):
            group = range(start, start + width)
            grow = [i for i in group if not kept[i] and sign * weight[i] * mean[i] > 0]
            drop = [i for i in group if kept[i] and sign * weight[i] * mean[i] < 0]
            if grow and drop:
                one = max(grow, key=lambda i: sign * weight[i] * mean[i] / variance[i])
                value = sign * weight[one] * mean[one] / variance[one]
                if best is None or value > best[0]:
                    best = value, one, min(drop, key=lambda i: abs(weight[i]) * norm[i])
        if best is None:
            break
        _, one, other = best
        new = error - weight[one] * mean[one] + weight[other] * mean[other]
        if abs(new) >= abs(error):
            break
        kept[one], kept[other], error = True, False, new
    return kept


@pytest.mark.parametrize("width", [None, 4])
@pytest.mark.parametrize("cycles", [1, 3, 50])
@pytest.mark.parametrize("seed", range(4))
def test_each_row_is_refined_by_the_equations(seed: int, cycles: int, width: int | None) -> None:
    weight_OI, mask_OI, inputs_NI = drawn(seed)
    refinement = DSnoT(cycles, threshold=0.05)
    found_OI = refinement.refine(weight_OI, mask_OI, gathered(refinement, weight_OI, inputs_NI), width)
    rows = zip(weight_OI.double().tolist(), mask_OI.tolist(), strict=True)
    assert found_OI.tolist() == [by_hand(*row, inputs_NI, cycles, 0.05, width or 16) for row in rows]
    assert (found_OI != mask_OI).any()


@pytest.mark.parametrize("width", [None, 4])
def test_counts_stay_and_expected_errors_never_rise(width: int | None) -> None:
    weight_OI, mask_OI, inputs_NI = drawn(9, outputs=40, inputs=64)
    refinement = DSnoT(threshold=0.0)
    found_OI = refinement.refine(weight_OI, mask_OI, gathered(refinement, weight_OI, inputs_NI), width)
    groups = (16, 4) if width else (1, 64)
    assert torch.equal(found_OI.unflatten(1, groups).sum(-1), mask_OI.unflatten(1, groups).sum(-1))
    before_O, after_O = (
        ((weight_OI * ~one).double() @ inputs_NI.double().mean(0)).abs() for one in (mask_OI, found_OI)
    )
    assert (after_O <= before_O + 1e-9).all() and after_O.sum() < 0.5 * before_O.sum()


@pytest.mark.parametrize(
    "case", ["zeros", "dead inputs", "constant inputs", "all kept", "all pruned", "one row", "bf16"]
)
def test_odd_matrices_end_in_masks_with_the_same_counts(case: str) -> None:
    weight_OI, mask_OI, inputs_NI = drawn(3, outputs=1 if case == "one row" else 6)
    if case == "zeros":
        weight_OI.zero_()
    if case == "dead inputs":
        inputs_NI[:, ::3] = 0
    if case == "constant inputs":
        inputs_NI[:] = 2.0
    if case.startswith("all"):
        mask_OI[:] = case == "all kept"
    if case == "bf16":
        weight_OI = weight_OI.bfloat16()
    refinement = DSnoT(threshold=0.0)
    found_OI = refinement.refine(weight_OI, mask_OI, gathered(refinement, weight_OI, inputs_NI), None)
    assert found_OI.dtype == torch.bool and torch.equal(found_OI.sum(1), mask_OI.sum(1))


def test_zeros_do_not_come_back() -> None:
    weight_OI, mask_OI, inputs_NI = drawn(5)
    weight_OI[~mask_OI & (torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(1)) < 0.5)] = 0
    refinement = DSnoT(threshold=0.0)
    found_OI = refinement.refine(weight_OI, mask_OI, gathered(refinement, weight_OI, inputs_NI), None)
    assert not (found_OI & ~mask_OI & (weight_OI == 0)).any() and (found_OI & ~mask_OI).any()


@pytest.mark.parametrize(
    ("settings", "said"), [({"max_cycles": 0}, "max_cycles=0"), ({"threshold": -1}, "threshold=-1")]
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=f"refine.{said}"):
        DSnoT(**settings)  # type: ignore[arg-type]
