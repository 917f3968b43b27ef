"""Pruning a window's matrices in place: statistics, scores, masks; also at another granularity than the windows.

With dense statistics a mask depends on nothing but its own matrix's inputs in the dense model, so that it does not
matter how much is pruned at once. With sparse statistics it does: the matrices of a pruning window are scored while
none of them is pruned yet. Pruning windows may be larger or smaller than the windows that are reconstructed:

    larger    all masks are made where the first window of the pruning window starts (`begin`)
    smaller   one after the other, each on what the pruned ones before it output (`prune`)

Gram matrices are large: where they are needed, a window of several layers is looked at layer by layer, in a pass of its
own, so that those of one layer are there at once.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from lightning import seed_everything
from torch import Tensor

from lit_recon.activations.boundary import Boundary
from lit_recon.activations.chain import Chain
from lit_recon.activations.passes import CALIBRATION
from lit_recon.activations.window_grams import Grams
from lit_recon.model.layerwise import float32_on
from lit_recon.model.matrices import Matrix
from lit_recon.model.windows import AnyWindow, Window, enclosing_windows
from lit_recon.pruning.criteria import Criterion, changes_weights, needs_gram, permutes
from lit_recon.pruning.criteria.given import GivenMasks
from lit_recon.pruning.decision import Decision, decide
from lit_recon.pruning.patterns import NM, Pattern, check_exchange, count_kept
from lit_recon.pruning.permutation import Order, find_orders
from lit_recon.pruning.refine import Refinement
from lit_recon.pruning.statistics import InputStatistics
from lit_recon.system.clock import Clock, timed
from lit_recon.system.finite import first_not_finite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruning:
    """What stays of a window's matrices, by their names.

    Attributes:
        masks: Boolean masks (True = kept), in the weights' shapes.
        weights: The weights that the criterion leaves, of those that it changes.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: "Pruning") -> None:
        """Take over what stays of others."""
        self.masks.update(other.masks)
        self.weights.update(other.weights)

    def of(self, names: Sequence[str]) -> "Pruning":
        """Of some matrices alone, where they can be pruned."""
        masks = {name: self.masks[name] for name in names if name in self.masks}
        return Pruning(masks, {name: self.weights[name] for name in names if name in self.weights})


@torch.no_grad()
def prune(window: AnyWindow, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> bool:
    """Zero the weights of a window that their masks (True = kept) remove, in place; whether that changed any.

    Args:
        window: The window.
        masks: By matrix.
        weights: Those that stay, where the criterion has changed them.
    """
    changed = False
    for matrix in window.matrices():
        if matrix.name in masks:
            changed |= bool(((matrix.weight != 0) & ~masks[matrix.name]).any())
            if weights and matrix.name in weights:
                matrix.weight.copy_(weights[matrix.name])
            matrix.weight.mul_(masks[matrix.name]).add_(0.0)  # which makes zeros of negative zeros
    return changed


class Pruner:
    """Decides what stays of one window after the other.

    Args:
        criterion: Scores weights.
        pattern: Turns scores into masks.
        chain: The chain at the current window.
        patterns: The pattern of each matrix or of each of its experts, by the matrix's name, if not `pattern`.
        refinement: Refines masks; None where nothing does.
        pruning_windows: What is pruned at once, where that is not each window: each larger or smaller than the windows.
            They make a difference with sparse statistics only.
        seed: Seed of what statistics and scores draw; each window adds the index of its first layer.
        clock: Takes the seconds.

    Attributes:
        instead: By matrix, what was scored by another criterion than the one that was asked for: the label of the
            matrix or expert, and that criterion. "magnitude": an expert that saw no token. "wanda": a matrix that could
            not be solved for.
        has_pruned: Whether weights were zeroed already in the last decision, one pruning window after the other.
    """

    def __init__(
        self,
        criterion: Criterion,
        pattern: Pattern,
        chain: Chain,
        *,
        patterns: Mapping[str, Sequence[Pattern]] | None = None,
        refinement: Refinement | None = None,
        pruning_windows: Sequence[Window] = (),
        seed: int = 0,
        clock: Clock | None = None,
    ) -> None:
        self.criterion, self.pattern, self.refinement, self.chain = criterion, pattern, refinement, chain
        self.pruning_windows = pruning_windows if chain.propagation.statistics == "sparse" else ()
        self.seed = seed
        self.clock = clock or Clock()
        self.patterns = dict(patterns or {})
        self.instead: dict[str, list[tuple[str, str]]] = {}
        self.has_pruned = False
        self._larger: Window | None = None  # the pruning window, larger than a window, in which the walk is
        self._waiting = Pruning()  # of that pruning window

    def labels(self, criterion: str) -> list[str]:
        """Labels of all matrices and experts that this criterion has scored instead."""
        return [label for found in self.instead.values() for label, used in found if used == criterion]

    @property
    def needs_gram(self) -> bool:
        """Whether Gram matrices of inputs are needed."""
        return needs_gram(self.criterion) or needs_gram(self.refinement)

    @property
    def updates(self) -> bool:
        """Whether the criterion changes the weights that stay."""
        return changes_weights(self.criterion)

    @property
    def pending(self) -> tuple[str, dict[str, Tensor]] | None:
        """Name and masks of the pruning window, larger than a window, in which the walk is."""
        return (self._larger.name, self._waiting.masks) if self._larger is not None else None

    def resume(
        self, pending: tuple[str, dict[str, Tensor]] | None, instead: Mapping[str, Sequence[Sequence[str]]]
    ) -> None:
        """Continue where another pruner had these `pending` masks and labels."""
        self.instead = {name: [(label, used) for label, used in found] for name, found in instead.items()}
        if pending is not None:
            (self._larger,) = [window for window in self.pruning_windows if window.name == pending[0]]
            self._waiting = Pruning(pending[1])

    @timed("teacher")
    def begin(self, window: Window) -> None:
        """Decide on a larger pruning window that starts here, before the first window's weights are moved.

        Seeds what statistics and scores draw, by the window alone, so that a run can be resumed.
        """
        seed_everything(self.seed + window.indices.start, verbose=False)
        larger = next((one for one in self.pruning_windows if _names(window) < _names(one)), None)
        if larger is not None and larger is not self._larger:
            assert self.chain.sparse and not self.updates
            with float32_on(larger, self.chain.passes.compute.device):
                self._waiting = self._decide_at(larger, self.chain.sparse.states_STD)
        self._larger = larger

    def statistics(self, window: Window, grams: Grams | None = None) -> InputStatistics:
        """Observes the dense pass over a window; of nothing where it is looked at in passes of its own.

        Args:
            window: The window.
            grams: Gram matrices that something else sums up in that pass.
        """
        own = self._larger is None and not self._smaller(window) and not self._goes_by_layer(window)
        matrices = window.matrices() if own else ()
        return InputStatistics(self.criterion, matrices, refinement=self.refinement, grams=grams)

    @timed("prune")
    def decide(self, window: Window, statistics: InputStatistics) -> Pruning:
        """What stays of a window's matrices, on their weights' device; of those that can be scored.

        Args:
            window: The window, dense, on the device.
            statistics: What `statistics` gave, after the dense pass.
        """
        self.has_pruned = False
        if self._larger is not None:
            found = self._waiting
        elif smaller := self._smaller(window):
            found = self._decide_in_turn(smaller)
        elif self._goes_by_layer(window):
            boundary = self.chain.sparse if self.chain.propagation.statistics == "sparse" else self.chain.dense
            assert boundary
            found = self._decide_at(window, boundary.states_STD)
        else:
            found = self._decide(window, statistics)
        found = found.of([matrix.name for matrix in window.matrices()])
        device = self.chain.passes.compute.device  # a resumed pruning window's masks are on the CPU
        return Pruning({name: mask.to(device) for name, mask in found.masks.items()}, found.weights)

    def _goes_by_layer(self, window: Window) -> bool:
        """Whether a window's layers are looked at one after the other."""
        return self.needs_gram and len(window.indices) > 1

    def _smaller(self, window: Window) -> list[Window]:
        """The pruning windows in a window that is larger."""
        return [one for one in self.pruning_windows if _names(one) < _names(window)]

    def _decide_in_turn(self, pruning_windows: Sequence[Window]) -> Pruning:
        """Score and prune one pruning window after the other, each on what the pruned ones before it output."""
        assert self.chain.sparse
        passes = self.chain.passes
        boundary = Boundary(passes.copy(self.chain.sparse.states_STD))
        made = Pruning()
        for window in pruning_windows:
            found = self._decide_at(window, boundary.states_STD)
            self.has_pruned |= prune(window, found.masks, found.weights)
            made.add(found)
            self.chain.step_over(boundary, window)
        return made

    def _decide_at(self, window: Window, states_STD: Tensor) -> Pruning:
        """What stays of a window by statistics of a pass over calibration samples that starts from these states."""
        passes, made = self.chain.passes, Pruning()
        layers = list(_layers(window)) if self._goes_by_layer(window) else [window]
        outputs_STD = passes.copy(states_STD) if len(layers) > 1 else None
        for layer in layers:
            statistics = InputStatistics(self.criterion, layer.matrices(), refinement=self.refinement)
            inputs_STD = states_STD if outputs_STD is None else outputs_STD
            passes.run(layer, inputs_STD, outputs_STD, [statistics], CALIBRATION)
            made.add(self._decide(layer, statistics))
        return made

    def _decide(self, window: Window, statistics: InputStatistics) -> Pruning:
        """What stays of a window's matrices, where they can be scored."""
        made = Pruning()
        orders = self._orders(window, statistics) if permutes(self.criterion) else {}
        for matrix in window.matrices():
            if matrix.input_dim is None:
                continue
            if isinstance(self.criterion, GivenMasks):
                made.add(self._given(self.criterion, matrix, statistics))
                continue
            order = orders.get(matrix.name)
            decisions = [self._decision(matrix, expert, statistics, order) for expert in range(matrix.experts)]
            self.instead[matrix.name] = [
                (matrix.label(expert), one.instead) for expert, one in enumerate(decisions) if one.instead
            ]
            made.masks[matrix.name] = matrix.as_weight(torch.stack([one.mask_OI for one in decisions]))
            if any(one.weight_OI is not None for one in decisions):
                weight_EOI = matrix.by_expert(matrix.weight)
                pairs = zip(decisions, weight_EOI, strict=True)
                left = [weight_OI if one.weight_OI is None else one.weight_OI for one, weight_OI in pairs]
                made.weights[matrix.name] = matrix.as_weight(torch.stack(left))
        return made

    def _orders(self, window: Window, statistics: InputStatistics) -> dict[str, Order]:
        """New orders of hidden channels of a window's MLPs, where their patterns are N:M."""

        def scores_of(matrix: Matrix) -> Tensor | None:
            seen, was_reached = statistics.for_criterion(matrix, 0)
            scores_OI = self.criterion.scores(matrix.by_expert(matrix.weight)[0], seen) if was_reached else None
            return scores_OI if scores_OI is not None and first_not_finite(scores_OI) is None else None

        names = {matrix.name for matrix in window.matrices()}
        patterns = {name: self.patterns.get(name, [self.pattern])[0] for name in names}
        found = {name: pattern for name, pattern in patterns.items() if isinstance(pattern, NM)}
        return find_orders(window, scores_of, found)

    def _given(self, criterion: GivenMasks, matrix: Matrix, statistics: InputStatistics) -> Pruning:
        """What stays of a matrix by a mask that is given; its weights are the given ones where these stay."""
        given, weight = (None if one is None else one.to(matrix.weight.device) for one in criterion.given(matrix))
        assert given is not None
        if weight is None:
            given &= matrix.weight != 0
        mask = given if self.refinement is None else self._refined(self.refinement, matrix, given, statistics)
        left = {} if weight is None else {matrix.name: torch.where(given, weight.float(), matrix.weight)}
        return Pruning({matrix.name: mask}, left)

    def _refined(self, refinement: Refinement, matrix: Matrix, mask: Tensor, statistics: InputStatistics) -> Tensor:
        """A mask, refined for each expert that saw a token; in a row, since no pattern is known that it has."""
        mask_EOI = matrix.by_expert(mask).clone()
        for expert, weight_OI in enumerate(matrix.by_expert(matrix.weight)):
            known, was_reached = statistics.for_refinement(matrix, expert)
            if was_reached:
                kept_O1 = count_kept(mask_EOI[expert], None)
                refined_OI = refinement.refine(weight_OI, mask_EOI[expert], known, None)
                check_exchange(refined_OI, kept_O1, weight_OI, label=matrix.label(expert), by=refinement)
                mask_EOI[expert] = refined_OI
        return matrix.as_weight(mask_EOI)

    def _decision(
        self, matrix: Matrix, expert: int, statistics: InputStatistics, order: Order | None = None
    ) -> Decision:
        """What stays of one matrix or expert, by its pattern."""
        patterns = self.patterns.get(matrix.name)
        pattern = self.pattern if patterns is None else patterns[expert % len(patterns)]
        decision = decide(
            matrix,
            expert,
            statistics,
            criterion=self.criterion,
            pattern=pattern,
            refinement=self.refinement,
            order=order,
        )
        if decision.instead == "wanda":
            log.warning(
                "%s: its Gram matrix has no Cholesky factor even with much damping; pruned by Wanda instead of %s",
                *(matrix.label(expert), type(self.criterion).__name__),
            )
        return decision


def _layers(window: Window) -> Iterator[Window]:
    """The layers of a window, each a window of its own."""
    for index, layer in zip(window.indices, window.layers, strict=True):
        mine = {id(parameter) for parameter in layer.parameters()}
        matrices = [matrix for matrix in window.matrices() if id(matrix.weight) in mine]
        yield Window(f"{window.name}.{index}", [layer], first=index, matrices=matrices)


def check_nested(pruning_windows: Sequence[Window], windows: Sequence[AnyWindow]) -> None:
    """Check that what is pruned at once is nested with what is reconstructed at once.

    Raises:
        ValueError: A window and a pruning window overlap in part.
    """
    for window in enclosing_windows(windows):
        names = _names(window)
        for pruning_window in pruning_windows:
            common = _names(pruning_window) & names
            if common and common not in (names, _names(pruning_window)):
                raise ValueError(
                    f"prune_by: {pruning_window.name} and window {window.name} overlap in part; expected one in the "
                    "other."
                )


def _names(window: Window) -> set[str]:
    return {matrix.name for matrix in window.matrices()}
