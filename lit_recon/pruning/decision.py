"""Decision of what stays of one matrix: scores, then a mask, then a better mask, then the weights that it leaves.

    criterion    scores -> pattern -> mask              weights: the dense ones where the mask keeps them
                 or, of one that updates (SparseGPT):   mask and weights together
    refinement   mask -> mask, for the dense weights;   weights: of a criterion that updates, made anew for that mask

What cannot be had is replaced by what needs less, and named: an expert that saw no token is scored by magnitude, and a
matrix that cannot be solved for by Wanda.

Shapes: O outputs, I inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_recon.model.matrices import Matrix
from lit_recon.pruning.criteria import Criterion, Pruned, Updates, needs_gram
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import Choice, Chooser, Chosen, Pattern, check_exchange, check_mask, count_kept
from lit_recon.pruning.permutation import Order
from lit_recon.pruning.refine import Refinement
from lit_recon.pruning.statistics import InputStatistics
from lit_recon.system.finite import NotFinite, first_not_finite

INSTEAD = ("magnitude", "wanda")  # criteria that are used where the one that was asked for cannot be


@dataclass(frozen=True)
class Decision:
    """What stays of one matrix, or of one expert of it.

    Attributes:
        mask_OI: What stays, boolean.
        weight_OI: The weights that the criterion leaves; None: the dense ones under the mask.
        instead: The criterion that was used instead of the one that was asked for, "magnitude" or "wanda"; or None.
    """

    mask_OI: Tensor
    weight_OI: Tensor | None
    instead: str | None


@torch.no_grad()
def decide(
    matrix: Matrix,
    expert: int,
    statistics: InputStatistics,
    *,
    criterion: Criterion,
    pattern: Pattern,
    refinement: Refinement | None,
    order: Order | None = None,
) -> Decision:
    """What stays of one matrix, or of one expert of it.

    Args:
        matrix: The matrix, dense.
        expert: Which of its experts; 0 of a plain matrix.
        statistics: Of its inputs.
        criterion: Scores its weights.
        pattern: Turns scores into a mask.
        refinement: Refines the mask; None where nothing does, nor where there is a new order.
        order: The order that its inputs or outputs are put into first; None: they stay where they are.

    Raises:
        NotFinite: A score, or a weight that the criterion has changed, is not finite.
        Unusable: A pattern or refinement, of the user's own, keeps another number of weights than it should.
    """
    weight_OI = matrix.by_expert(matrix.weight)[expert]
    seen, was_reached = statistics.for_criterion(matrix, expert)
    if order is not None:
        assert refinement is None and not isinstance(criterion, Updates)
        return _in_order(order, matrix, criterion, pattern, seen if was_reached else None, was_reached)
    choose: Chooser = Choice(pattern, weight_OI)
    if not was_reached:
        decision = Decision(choose(Magnitude().scores(weight_OI, None)), None, "magnitude")
    else:
        decision = _by(criterion, matrix, expert, seen, choose)
    check_mask(decision.mask_OI, weight_OI, pattern, matrix.label(expert))
    if refinement is None or not was_reached:
        return decision
    known, was_reached = statistics.for_refinement(matrix, expert)
    if not was_reached:
        return decision
    width = Choice(pattern, weight_OI).width
    kept_OG = count_kept(decision.mask_OI, width)
    mask_OI = refinement.refine(weight_OI, decision.mask_OI, known, width)
    check_exchange(mask_OI, kept_OG, weight_OI, label=matrix.label(expert), by=refinement)
    if decision.weight_OI is None:
        return Decision(mask_OI, None, decision.instead)
    decision = _by(criterion, matrix, expert, seen, Chosen(mask_OI))
    check_exchange(decision.mask_OI, kept_OG, weight_OI, label=matrix.label(expert), by=criterion)
    return decision


def _in_order(
    order: Order, matrix: Matrix, criterion: Criterion, pattern: Pattern, seen: object, was_reached: bool
) -> Decision:
    """What stays of a matrix in a new order of its inputs or outputs."""
    (weight_OI,) = matrix.by_expert(matrix.weight)
    scores_OI = criterion.scores(weight_OI, seen) if was_reached else Magnitude().scores(weight_OI, None)
    _check(scores_OI, matrix.name, seen)
    ordered_OI = order(weight_OI)
    mask_OI = Choice(pattern, ordered_OI)(order(scores_OI))
    check_mask(mask_OI, ordered_OI, pattern, matrix.name)
    return Decision(mask_OI, ordered_OI, None if was_reached else "magnitude")


def _by(criterion: Criterion, matrix: Matrix, expert: int, seen: object, choose: Chooser) -> Decision:
    """What stays by a criterion alone."""
    weight_OI = matrix.by_expert(matrix.weight)[expert]
    if not isinstance(criterion, Updates):
        scores_OI = criterion.scores(weight_OI, seen)
        _check(scores_OI, matrix.label(expert), seen)
        return Decision(choose(scores_OI), None, None)
    try:
        pruned: Pruned = criterion.prune(weight_OI, seen, choose)
    except torch.linalg.LinAlgError:
        assert needs_gram(criterion) and isinstance(seen, Tensor)
        scores_OI = Wanda().scores(weight_OI, seen.diagonal())
        _check(scores_OI, matrix.label(expert), seen)
        return Decision(choose(scores_OI), None, "wanda")
    if found := first_not_finite(pruned.weight_OI):
        raise NotFinite(f"pruned weights of {matrix.label(expert)} are not finite, first {_place(found)}")
    return Decision(*pruned, None)


def _check(scores_OI: Tensor, label: str, statistics: object) -> None:
    """Raise NotFinite where a score is not finite."""
    if found := first_not_finite(scores_OI):
        overflown = isinstance(statistics, Tensor) and first_not_finite(statistics)
        what = "statistics of the inputs" if overflown else "scores"
        raise NotFinite(f"{what} of {label} are not finite, first {_place(found)}")


def _place(found: tuple[int, ...]) -> str:
    """An entry of a matrix in words."""
    return f"for output {found[0]} and input {found[1]}"
