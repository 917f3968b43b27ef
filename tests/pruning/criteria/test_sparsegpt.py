"""SparseGPT against the paper's updates column by column, with an inverse for each, and on what has no inverse."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_recon.pruning.criteria import Pruned, sparsegpt
from lit_recon.pruning.criteria.sparsegpt import SparseGPT
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import NM, Choice, Chosen, Pattern, Unstructured

OUTPUTS, INPUTS = 12, 40
PATTERNS = (
    Unstructured(sparsity=0.5),
    Unstructured(sparsity=0.37),
    Unstructured(sparsity=0.63, scope="matrix"),
    NM(n=2, m=4),
    NM(n=3, m=8),
)


def weight_and_inputs(*, outputs: int = OUTPUTS, inputs: int = INPUTS, rows: int = 200) -> tuple[Tensor, Tensor]:
    """Random weights, and inputs that depend on each other and are of unlike sizes."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    mixed_II = torch.randn(inputs, inputs, generator=generator) * torch.rand(inputs, generator=generator)
    return weight_OI, torch.randn(rows, inputs, generator=generator) @ mixed_II


def gram_of(inputs_NI: Tensor) -> Tensor:
    return inputs_NI.T @ inputs_NI


def prune(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern, **settings: Any) -> Pruned:
    return SparseGPT(**settings).prune(weight_OI, gram_II, Choice(pattern, weight_OI))


def kept(scores_OC: Tensor, first: int, pattern: Pattern) -> Tensor:
    """The mask of some columns, by a full sort of each group that is compared."""
    outputs, columns = scores_OC.shape
    if isinstance(pattern, NM):
        groups_RC, drop = scores_OC.reshape(-1, pattern.m), pattern.m - pattern.n
    else:
        per_column = 1 if pattern.scope == "row" else outputs
        groups_RC = scores_OC.reshape(-1, per_column * columns)
        before, after = (int(pattern.sparsity * per_column * end + 1e-6) for end in (first, first + columns))
        drop = after - before
    mask_RC = torch.ones(groups_RC.shape, dtype=torch.bool)
    mask_RC.scatter_(1, groups_RC.argsort(dim=1, stable=True)[:, :drop], False)
    return mask_RC.view(scores_OC.shape)


def reference(
    weight_OI: Tensor, gram_II: Tensor, pattern: Pattern, *, block_size: int = 128, damping: float = 0.01
) -> Pruned:
    """The paper's updates in float64: the Hessian of the columns that are left is inverted for every column."""
    weight_OI, hessian_II = weight_OI.double().clone(), gram_II.double().clone()
    mask_OI, diagonal_I = torch.zeros(weight_OI.shape, dtype=torch.bool), hessian_II.diagonal()
    dead_I, zero_OI = diagonal_I == 0, weight_OI == 0
    diagonal_I += damping * diagonal_I[~dead_I].mean().nan_to_num()
    diagonal_I[dead_I] = 1
    inverses = [torch.linalg.inv(hessian_II[column:, column:]) for column in range(len(hessian_II))]
    step = pattern.m if isinstance(pattern, NM) else block_size
    for first in range(0, len(hessian_II), step):
        block = slice(first, min(first + step, len(hessian_II)))
        scores_OC = weight_OI[:, block] ** 2 / torch.stack([inverse_FF[0, 0] for inverse_FF in inverses[block]])
        scores_OC[:, dead_I[block]] = 0
        scores_OC[zero_OI[:, block]] = -1
        mask_OI[:, block] = kept(scores_OC, first, pattern) & ~zero_OI[:, block]
        for column in range(block.start, block.stop):
            row_F = inverses[column][0] / inverses[column][0, 0]
            weight_OI[:, column:] -= (weight_OI[:, column] * ~mask_OI[:, column])[:, None] * row_F
    return Pruned(mask_OI, weight_OI * mask_OI)


def assert_same(found: Pruned, expected: Pruned) -> None:
    assert found.mask_OI.dtype == torch.bool and torch.equal(found.mask_OI, expected.mask_OI)
    assert (found.weight_OI[~found.mask_OI] == 0).all()
    scale = expected.weight_OI.abs().max().item()
    torch.testing.assert_close(found.weight_OI.double(), expected.weight_OI, rtol=1e-4, atol=1e-5 * scale)


def test_a_row_of_two_weights_by_hand() -> None:
    gram_II = torch.tensor(
        [[2 / 1.01, 1.0], [1.0, 2 / 1.01]]
    )  # with damping [[2, 1], [1, 2]]; inverse [[2, -1], [-1, 2]] / 3
    weight_OI = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    torch.testing.assert_close(SparseGPT().scores(weight_OI, gram_II), torch.tensor([[1.5, 13.5], [13.5, 1.5]]))
    found = prune(weight_OI, gram_II, Unstructured(sparsity=0.5))
    assert found.mask_OI.tolist() == [[False, True], [True, False]]
    # The first goes: 3 - 1 * (-1 / 3) / (2 / 3). The second goes: it has none after it to make up for it.
    torch.testing.assert_close(found.weight_OI, torch.tensor([[0.0, 3.5], [3.0, 0.0]]))


def test_scores_of_inputs_that_do_not_depend_on_each_other_are_squares_times_energies() -> None:
    weight_OI = torch.tensor([[1.0, -2.0, 0.0, 3.0], [0.5, 1.0, -1.0, 2.0], [-4.0, 0.0, 2.0, 1.0]])
    energies_I = torch.tensor([4.0, 1.0, 0.0, 1.0])  # the mean over three that are not zero is 2: damping adds 0.02
    expected_OI = weight_OI.square() * torch.tensor([4.02, 1.02, 0.0, 1.02])
    torch.testing.assert_close(SparseGPT().scores(weight_OI, energies_I.diag()), expected_OI)


def test_scores_are_the_errors_that_a_solve_without_each_weight_leaves() -> None:
    weight_OI, inputs_NI = weight_and_inputs(outputs=3, inputs=6)
    hessian_II = gram_of(inputs_NI).double()
    hessian_II.diagonal().add_(0.01 * hessian_II.diagonal().mean())
    found_OI = SparseGPT().scores(weight_OI, gram_of(inputs_NI))
    for column in range(6):
        others = [other for other in range(6) if other != column]
        schur = hessian_II[column, column] - hessian_II[column, others] @ torch.linalg.solve(
            hessian_II[others][:, others], hessian_II[others, column]
        )
        torch.testing.assert_close(
            found_OI[:, column].double(), weight_OI[:, column].double() ** 2 * schur, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("block_size", [1, 4, 7, 16, 128])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masks_and_weights_are_those_of_the_paper_column_by_column(pattern: Pattern, block_size: int) -> None:
    weight_OI, inputs_NI = weight_and_inputs()
    before_OI, gram_II = weight_OI.clone(), gram_of(inputs_NI)
    found = prune(weight_OI, gram_II, pattern, block_size=block_size)
    assert_same(found, reference(weight_OI, gram_II, pattern, block_size=block_size))
    assert torch.equal(weight_OI, before_OI) and torch.equal(gram_II, gram_of(inputs_NI))  # both are only read


@pytest.mark.parametrize("leaf", [1, 3, 16])
def test_a_matrix_that_is_wider_than_all_that_is_done_at_once_is_that_of_the_paper_too(
    leaf: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsegpt, "_LEAF", leaf)
    monkeypatch.setattr(sparsegpt, "_INVERTED", 2 * leaf)
    weight_OI, inputs_NI = weight_and_inputs(outputs=5, inputs=101)
    pattern = Unstructured(sparsity=0.5)
    found = prune(weight_OI, gram_of(inputs_NI), pattern, block_size=24)
    assert_same(found, reference(weight_OI, gram_of(inputs_NI), pattern, block_size=24))


def test_columns_are_chosen_once_from_left_to_right_in_blocks_or_groups() -> None:
    weight_OI, inputs_NI = weight_and_inputs()

    def seen(choose: Choice) -> list[tuple[int, int]]:
        asked = []

        class Noted:
            width = choose.width

            def __call__(self, scores_OC: Tensor, first: int = 0) -> Tensor:
                asked.append((first, scores_OC.shape[1]))
                return choose(scores_OC, first)

        SparseGPT(block_size=16).prune(weight_OI, gram_of(inputs_NI), Noted())
        return asked

    assert seen(Choice(Unstructured(sparsity=0.5), weight_OI)) == [(0, 16), (16, 16), (32, 8)]
    assert seen(Choice(NM(n=4, m=8), weight_OI)) == [(0, 8), (8, 8), (16, 8), (24, 8), (32, 8)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_error_is_below_that_of_the_same_mask_without_updates_and_below_that_of_wanda(pattern: Pattern) -> None:
    weight_OI, inputs_NI = weight_and_inputs(outputs=32)

    def error(pruned_OI: Tensor) -> float:
        return (inputs_NI @ (pruned_OI - weight_OI).T).square().sum().item()

    found = prune(weight_OI, gram_of(inputs_NI), pattern, block_size=16)
    wanda_OI = Choice(pattern, weight_OI)(Wanda().scores(weight_OI, gram_of(inputs_NI).diagonal()))
    assert error(found.weight_OI) < 0.7 * error(weight_OI * found.mask_OI)
    assert error(found.weight_OI) < error(weight_OI * wanda_OI)


def test_weights_for_a_mask_that_is_given_are_those_of_the_mask_that_was_chosen() -> None:
    weight_OI, inputs_NI = weight_and_inputs()
    criterion, gram_II = SparseGPT(block_size=8), gram_of(inputs_NI)
    chosen = criterion.prune(weight_OI, gram_II, Choice(Unstructured(sparsity=0.5), weight_OI))
    again = criterion.prune(weight_OI, gram_II, Chosen(chosen.mask_OI))
    assert torch.equal(again.mask_OI, chosen.mask_OI) and torch.equal(again.weight_OI, chosen.weight_OI)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", ["fewer rows", "one row", "constant", "equal", "outlier", "dead", "all dead"])
def test_inputs_that_have_no_inverse_are_pruned_as_in_the_paper(kind: str, pattern: Pattern) -> None:
    weight_OI, inputs_NI = weight_and_inputs()
    inputs_NI = inputs_NI[: {"fewer rows": 10, "one row": 1}.get(kind)]
    if kind == "constant":
        inputs_NI[:, [0, 5, 39]] = 1.0
    elif kind == "equal":
        inputs_NI[:, 7] = inputs_NI[:, 30]
    elif kind == "outlier":
        inputs_NI[:, 11] *= 1000
    elif kind == "dead":
        inputs_NI[:, [0, 13, 14, 38]] = 0
    elif kind == "all dead":
        inputs_NI[:] = 0
    found = prune(weight_OI, gram_of(inputs_NI), pattern, block_size=16)
    assert found.weight_OI.isfinite().all()
    assert_same(found, reference(weight_OI, gram_of(inputs_NI), pattern, block_size=16))
    if kind == "dead":
        stays_OI = found.mask_OI[:, [0, 13, 14, 38]]  # where the pattern has no room to drop them all
        assert torch.equal(found.weight_OI[:, [0, 13, 14, 38]], weight_OI[:, [0, 13, 14, 38]] * stays_OI)
        if isinstance(pattern, Unstructured):
            assert not stays_OI.any()


def test_zeros_go_first_and_none_of_them_comes_back() -> None:
    weight_OI, inputs_NI = weight_and_inputs()
    weight_OI[torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = 0
    for pattern in PATTERNS:
        found = prune(weight_OI, gram_of(inputs_NI), pattern, block_size=8)
        assert_same(found, reference(weight_OI, gram_of(inputs_NI), pattern, block_size=8))
        assert (found.weight_OI[weight_OI == 0] == 0).all()
    found = prune(torch.zeros(3, INPUTS), gram_of(inputs_NI), Unstructured(sparsity=0.5))
    assert not found.mask_OI.any() and (found.weight_OI == 0).all()


@pytest.mark.parametrize("shape", [(1, INPUTS), (OUTPUTS, 1), (1, 1)])
def test_single_rows_and_columns(shape: tuple[int, int]) -> None:
    weight_OI, inputs_NI = weight_and_inputs(outputs=shape[0], inputs=shape[1])
    for pattern in (Unstructured(sparsity=0.5), Unstructured(sparsity=0.5, scope="matrix")):
        expected = reference(weight_OI, gram_of(inputs_NI), pattern)
        assert_same(prune(weight_OI, gram_of(inputs_NI), pattern), expected)


def test_nothing_is_changed_where_nothing_goes() -> None:
    weight_OI, inputs_NI = weight_and_inputs()
    found = prune(weight_OI, gram_of(inputs_NI), Unstructured(sparsity=0.0))
    assert found.mask_OI.all() and torch.equal(found.weight_OI, weight_OI)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_dtype_are_solved_for_in_float32_and_keep_it(dtype: torch.dtype) -> None:
    weight_OI, inputs_NI = weight_and_inputs()
    weight_OI, pattern = weight_OI.to(dtype), Unstructured(sparsity=0.5)
    found = prune(weight_OI, gram_of(inputs_NI), pattern)
    expected = prune(weight_OI.float(), gram_of(inputs_NI), pattern)
    assert found.weight_OI.dtype == dtype
    assert torch.equal(found.mask_OI, expected.mask_OI) and torch.equal(found.weight_OI, expected.weight_OI.to(dtype))


def test_weights_that_are_stored_transposed_and_parameters_are_pruned_as_any_other() -> None:
    weight_OI, inputs_NI = weight_and_inputs()
    expected = prune(weight_OI, gram_of(inputs_NI), NM(n=2, m=4))
    for same_OI in (weight_OI.T.contiguous().T, torch.nn.Parameter(weight_OI)):
        found = prune(same_OI, gram_of(inputs_NI), NM(n=2, m=4))
        assert torch.equal(found.mask_OI, expected.mask_OI) and torch.equal(found.weight_OI, expected.weight_OI)
        assert not found.weight_OI.requires_grad
        assert torch.equal(same_OI, weight_OI)  # it stays dense, also where no copy is needed to transpose it


@pytest.mark.parametrize(("between", "damping"), [(0.5, 0.01), (1.05, 0.1), (1.5, 1.0)])
def test_damping_grows_tenfold_until_the_sum_is_positive_definite(between: float, damping: float) -> None:
    gram_II = torch.tensor([[1.0, between], [between, 1.0]])  # eigenvalues 1 + between, 1 - between
    weight_OI, _ = weight_and_inputs(inputs=2)
    expected = reference(weight_OI, gram_II, Unstructured(sparsity=0.5), damping=damping)
    assert_same(prune(weight_OI, gram_II, Unstructured(sparsity=0.5)), expected)
    assert_same(prune(weight_OI, gram_II, Unstructured(sparsity=0.5), damping=damping), expected)


@pytest.mark.parametrize(
    "gram_II",
    [
        torch.tensor([[1.0, 3.0], [3.0, 1.0]]),
        -torch.eye(2),
        torch.tensor([[1.0, 0.0], [0.0, -9.0]]),
        torch.tensor([[1.0, 0.0], [0.0, torch.inf]]),
        torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]),
    ],
    ids=["indefinite", "negative definite", "a negative entry", "infinite", "not a number"],
)
@pytest.mark.parametrize("damping", [0.01, 0.3, 1.0])
def test_a_matrix_that_no_damping_makes_positive_definite_is_an_error_of_linear_algebra(
    gram_II: Tensor, damping: float
) -> None:
    weight_OI, _ = weight_and_inputs(inputs=2)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive"):
        prune(weight_OI, gram_II, Unstructured(sparsity=0.5), damping=damping)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive"):
        SparseGPT(damping=damping).scores(weight_OI, gram_II)


def test_matrices_with_the_same_gram_matrix_share_a_factor_that_lives_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[weakref.ref] = []

    def factor_of(*args: Any) -> Any:
        factor = factor_of_gram(*args)
        made.append(weakref.ref(factor.lower_II))
        return factor

    factor_of_gram = sparsegpt._factor_of
    monkeypatch.setattr(sparsegpt, "_factor_of", factor_of)
    criterion, pattern = SparseGPT(), Unstructured(sparsity=0.5)
    weight_OI, inputs_NI = weight_and_inputs()
    gram_II, other_II = gram_of(inputs_NI), gram_of(inputs_NI[:100])
    for part_OI in weight_OI.split(4):
        assert_same(criterion.prune(part_OI, gram_II, Choice(pattern, part_OI)), reference(part_OI, gram_II, pattern))
    assert len(made) == 1 and made[0]() is not None
    criterion.prune(weight_OI, other_II, Choice(pattern, weight_OI))
    assert len(made) == 2 and made[0]() is None  # one at a time
    del other_II
    gc.collect()
    assert made[1]() is None


def test_rows_that_are_added_to_a_gram_matrix_in_place_count() -> None:
    criterion, pattern = SparseGPT(), Unstructured(sparsity=0.5)
    weight_OI, inputs_NI = weight_and_inputs()
    gram_II = gram_of(inputs_NI[:30])
    criterion.prune(weight_OI, gram_II, Choice(pattern, weight_OI))
    gram_II += gram_of(inputs_NI[30:])
    found = criterion.prune(weight_OI, gram_II, Choice(pattern, weight_OI))
    assert_same(found, reference(weight_OI, gram_II, pattern))


def test_a_criterion_that_was_used_can_be_copied() -> None:
    weight_OI, inputs_NI = weight_and_inputs()
    criterion, gram_II = SparseGPT(block_size=4, damping=0.1), gram_of(inputs_NI)
    expected_OI = criterion.scores(weight_OI, gram_II)
    copied = copy.deepcopy(criterion)
    assert (copied.block_size, copied.damping) == (4, 0.1)
    assert torch.equal(copied.scores(weight_OI, gram_II), expected_OI)


def test_it_asks_for_gram_matrices_and_gathers_nothing() -> None:
    assert SparseGPT.needs_gram and SparseGPT().start(torch.ones(2, 3)) is None


@pytest.mark.parametrize("block_size", [0, -1, 1.5, "128", True])
def test_a_block_without_columns_is_refused(block_size: object) -> None:
    with pytest.raises(ValueError, match=r"criterion\.block_size=.*such as 128"):
        SparseGPT(block_size=block_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("damping", [0, -0.1, 1.01, float("nan"), None])
def test_damping_that_is_no_positive_share_is_refused(damping: object) -> None:
    with pytest.raises(ValueError, match=r"criterion\.damping=.*\(0, 1\]"):
        SparseGPT(damping=damping)  # type: ignore[arg-type]
