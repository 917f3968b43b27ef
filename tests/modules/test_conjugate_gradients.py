"""The solver finds what a dense solve per row finds, never does harm, and bears every degenerate input."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lit_recon.modules.conjugate_gradients import DAMPING, solve
from lit_recon.pruning.patterns import NM, Unstructured

EXACT = {"tolerance": 1e-10, "max_iterations": 500}
HARDLY_DAMPED = EXACT | {"damping": 1e-4}


@dataclass(frozen=True)
class Problem:
    start: Tensor
    mask: Tensor
    inputs: Tensor
    targets: Tensor

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        return self.inputs.T @ self.inputs, self.targets.T @ self.inputs

    def solve(self, **settings) -> Tensor:
        return solve(self.start, self.mask, *self.moments, **settings)

    def errors(self, weight: Tensor) -> Tensor:
        """The squared error of each row, from the activations themselves."""
        return (self.inputs @ weight.double().T - self.targets).square().sum(0)

    def objective(self, weight: Tensor) -> Tensor:
        """What is minimised, of each row: the squared error, damped."""
        pull = self.inputs.square().sum(0) * (weight.double() - self.start.double()).square()
        return self.errors(weight) + DAMPING * pull.sum(1)


def reference(problem: Problem, damping: float) -> Tensor:
    """Row by row, a float64 least-squares solve on the support; inputs that are always zero are left out."""
    solution = problem.start.double() * problem.mask
    norms = problem.inputs.norm(dim=0)
    for row, mask, targets in zip(solution, problem.mask, problem.targets.T, strict=True):
        free = mask & (norms > 0)
        matrix = torch.cat([problem.inputs[:, free], torch.diag(damping**0.5 * norms[free])])
        wanted = torch.cat([targets - problem.inputs @ row, torch.zeros(int(free.sum()), dtype=torch.float64)])
        row[free] += torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution[:, 0]
    return solution


def problem(kind: str, *, outputs: int = 24, inputs: int = 64, rows: int = 400) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(30 if kind == "fewer rows than inputs" else rows, inputs)
    if kind == "outliers":  # two inputs a thousand times the others, and the others a strong common part
        x = x * 0.02 + normal(len(x), 1)
        x[:, :2] = x[:, :2] * 1000 + 500
    if kind == "correlated":  # singular values from 1 down to 1e-4, in directions that mix all inputs
        directions = torch.linalg.qr(normal(inputs, inputs)).Q
        x = x * torch.logspace(0, -4, inputs, dtype=torch.float64) @ directions
    if kind == "dead inputs":
        x[:, ::5] = 0
    dense = normal(outputs, inputs).float()
    scores = dense.abs() * x.norm(dim=0).float()
    mask = NM(n=2, m=4)(scores) if kind == "2:4" else Unstructured(sparsity=0.5)(scores)
    if kind == "fully pruned row":
        mask[3] = False
    y = x @ dense.double().T
    if kind == "other targets":
        y = y + 0.5 * normal(*y.shape) + torch.tanh(y)
    return Problem(dense * mask, mask, x, y)


KINDS = [
    "well conditioned",
    "outliers",
    "correlated",
    "fewer rows than inputs",
    "dead inputs",
    "2:4",
    "fully pruned row",
    "other targets",
]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_the_solution_is_that_of_a_dense_solve_per_row(kind: str) -> None:
    case = problem(kind)
    found, expected = case.solve(**EXACT), reference(case, DAMPING)
    assert distance(case.inputs @ found.double().T, case.inputs @ expected.T) < 1e-4
    if kind not in ("outliers", "correlated"):  # their outputs hardly depend on some directions of the weights
        assert distance(found, expected) < 1e-4


@pytest.mark.parametrize("kind", ["well conditioned", "2:4", "other targets"])
def test_the_damping_is_not_seen_where_the_problem_is_well_conditioned(kind: str) -> None:
    case = problem(kind)
    undamped = reference(case, 0)
    found = case.solve(**HARDLY_DAMPED)
    assert distance(case.inputs @ found.double().T, case.inputs @ undamped.T) < 1e-4
    assert case.errors(found).sum() < case.errors(undamped).sum() * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-4])
def test_no_row_leaves_more_than_the_tolerance_of_its_possible_gain(kind: str, tolerance: float) -> None:
    case = problem(kind)
    best, start = case.objective(reference(case, DAMPING)), case.objective(case.start)
    left = case.objective(case.solve(tolerance=tolerance)) - best
    assert (left <= tolerance * (start - best) + 1e-9 * start).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_iterations", [0, 1, 2, 3, 5, 500])
def test_no_row_is_worse_than_its_start_wherever_the_iterations_stop(kind: str, max_iterations: int) -> None:
    case = problem(kind)
    found = case.solve(tolerance=0, max_iterations=max_iterations)
    start = case.errors(case.start)
    assert (case.errors(found) <= start * (1 + 1e-12)).all()
    assert max_iterations == 0 or case.errors(found).sum() < start.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_that_is_the_minimum_does_not_get_worse(kind: str) -> None:
    case = problem(kind)
    best = Problem(case.solve(**EXACT), case.mask, case.inputs, case.targets)
    assert (best.errors(best.solve(**EXACT)) <= best.errors(best.start) * (1 + 1e-12)).all()


def test_a_row_keeps_its_start_where_rounding_to_float32_costs_more_than_there_is_to_gain() -> None:
    case = problem("correlated", outputs=200)
    noise = torch.randn(case.start.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    best = case.start.double() * (1 + 2e-8 * noise)  # a third of the distance of two numbers in float32
    near = Problem(case.start, case.mask, case.inputs, case.inputs @ best.T)
    found = near.solve(**EXACT)
    assert (near.errors(found) <= near.errors(near.start) * (1 + 1e-6)).all()
    assert (found == near.start).all(1).any()
    assert (found != near.start).any(1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_off_the_mask_are_exact_zeros_whatever_the_start_has_there(kind: str) -> None:
    case = problem(kind)
    dirty = case.start.masked_fill(~case.mask, float("nan"))
    found = solve(dirty, case.mask, *case.moments)
    assert found.dtype == torch.float32
    assert (found[~case.mask] == 0).all()
    assert torch.equal(found, case.solve())


def test_weights_of_dead_inputs_keep_their_start() -> None:
    case = problem("dead inputs")
    start = torch.randn(case.mask.shape, generator=torch.Generator().manual_seed(1)) * case.mask
    found = solve(start, case.mask, *case.moments)
    assert torch.equal(found[:, ::5], start[:, ::5])
    assert not torch.equal(found, start)


def test_a_fully_pruned_row_stays_zero_and_others_do_not_notice() -> None:
    case, whole = problem("fully pruned row"), problem("well conditioned")
    found = case.solve(**EXACT)
    others = torch.arange(len(found)) != 3
    assert (found[3] == 0).all()
    torch.testing.assert_close(found[others], whole.solve(**EXACT)[others])


def test_rows_that_finish_early_are_the_same_alone_as_beside_others() -> None:
    case = problem("correlated")
    early = torch.tensor([0, 5, 9])
    start, mask, (gram, cross) = case.start.clone(), case.mask.clone(), case.moments
    mask[early] = torch.arange(mask.shape[1]) == 7  # one weight, one iteration
    start *= mask
    alone = solve(start[early], mask[early], gram, cross[early], **EXACT)
    stacked = solve(start, mask, gram, cross, **EXACT)
    torch.testing.assert_close(stacked[early], alone)
    others = torch.ones(len(mask), dtype=torch.bool).index_fill_(0, early, False)
    expected = reference(case, DAMPING)[others]
    assert distance(case.inputs @ stacked[others].double().T, case.inputs @ expected.T) < 1e-4


def test_where_all_inputs_are_zero_the_start_is_the_solution() -> None:
    case = problem("well conditioned")
    zeros = [torch.zeros_like(moment) for moment in case.moments]
    assert torch.equal(solve(case.start, case.mask, *zeros), case.start)


def test_with_uncorrelated_inputs_each_weight_is_solved_for_itself() -> None:
    start, mask = torch.tensor([[3.0, 0.0, 1.0]]), torch.tensor([[True, False, True]])
    gram, cross = torch.diag(torch.tensor([1e6, 1.0, 1e-6])), torch.tensor([[2e6, 7.0, -5e-6]])
    torch.testing.assert_close(
        solve(start, mask, gram, cross, **HARDLY_DAMPED), torch.tensor([[2.0, 0.0, -5.0]]), rtol=2e-4, atol=0
    )


def test_a_matrix_of_one_column_is_solved() -> None:
    start, mask = torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[True], [False], [True]])
    found = solve(start, mask, torch.tensor([[4.0]]), torch.tensor([[8.0], [8.0], [-4.0]]), **HARDLY_DAMPED)
    torch.testing.assert_close(found, torch.tensor([[2.0], [0.0], [-1.0]]), rtol=4e-4, atol=0)


def test_zero_targets_and_a_zero_start_give_zeros() -> None:
    case = problem("well conditioned")
    gram, cross = case.moments
    assert (solve(torch.zeros_like(case.start), case.mask, gram, torch.zeros_like(cross)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_and_moments_of_other_types_are_taken(dtype: torch.dtype) -> None:
    case = problem("well conditioned")
    gram, cross = (moment.float() for moment in case.moments)
    found = solve(case.start.to(dtype), case.mask, gram, cross, **EXACT)
    assert found.dtype == torch.float32
    assert distance(found, reference(case, DAMPING)) < (1e-4 if dtype == torch.float32 else 1e-3)


def test_the_same_problem_gives_the_same_bits() -> None:
    assert torch.equal(problem("outliers").solve(), problem("outliers").solve())


def test_the_arguments_are_left_as_they_were() -> None:
    case = problem("dead inputs")
    start, mask, (gram, cross) = case.start.double(), case.mask.clone(), case.moments
    copies = [tensor.clone() for tensor in (start, mask, gram, cross)]
    solve(start, mask, gram, cross)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((start, mask, gram, cross), copies, strict=True))


def test_iterations_are_reported_in_order_with_what_the_error_fell_by() -> None:
    case, seen = problem("well conditioned"), []
    found = case.solve(**EXACT, on_iteration=lambda iteration, gained: seen.append((iteration, gained)))
    iterations, gained = zip(*seen, strict=True)
    assert list(iterations) == list(range(1, len(seen) + 1))
    assert list(gained) == sorted(gained)
    assert gained[-1] == pytest.approx(float((case.objective(case.start) - case.objective(found)).sum()), rel=1e-3)


def test_a_gram_that_is_none_is_refused() -> None:
    case = problem("well conditioned")
    gram, cross = case.moments
    for wrong in (gram.clone().fill_(float("nan")), 2 * gram.diagonal().diag() - 50 * gram):
        with pytest.raises(torch.linalg.LinAlgError):
            solve(case.start, case.mask, wrong, cross)
