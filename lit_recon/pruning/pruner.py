"""Statistics, scores, masks: prune a window's matrices in place, or part of the model at another granularity.

With dense statistics a mask depends on nothing but its own matrix's inputs in the dense model, so that it does not
matter how much is pruned at once. With sparse statistics it does: what is pruned together is scored while none of it
is pruned yet. `Pruner` handles units that are larger or smaller than the windows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from lit_recon.activations.chain import CALIBRATION, Boundary, Chain, Watching, watching_nothing
from lit_recon.model.decoder import float32_on
from lit_recon.model.matrices import Matrix, Product, observed
from lit_recon.model.windows import AnyWindow, Window
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.patterns import Pattern


class Statistics:
    """What a criterion gathers of the inputs of some matrices, for each expert by itself.

    Args:
        criterion: The criterion.
        matrices: The matrices that will be pruned.
    """

    def __init__(self, criterion: Criterion, matrices: Sequence[Matrix]) -> None:
        self.criterion = criterion
        scored = [matrix for matrix in matrices if matrix.input_dim is not None]
        self.by_name = {
            matrix.name: [criterion.start(weight_OI) for weight_OI in matrix.by_expert(matrix.weight)]
            for matrix in scored
        }
        self.watched = [matrix for matrix in scored if self.by_name[matrix.name][0] is not None]
        self._rows = {matrix.name: [0] * matrix.experts for matrix in scored}

    def observe(self, product: Product) -> None:
        """Add what a watched matrix is multiplied by."""
        name, expert, inputs_NI = product.matrix.name, product.expert, product.rows_NI
        self._rows[name][expert] += len(inputs_NI)
        self.by_name[name][expert] = self.criterion.update(self.by_name[name][expert], inputs_NI)

    def watching(self, part: str) -> AbstractContextManager:
        """The context in which products are observed; statistics never see held-out samples."""
        return observed(self.watched, self.observe) if part == "calibration" else nullcontext()

    def scores(self, matrix: Matrix) -> tuple[Tensor, list[str]]:
        """Scores (E, O, I), and the labels of the experts that saw no token and are scored by magnitude."""
        unseen = [
            expert
            for expert, statistics in enumerate(self.by_name[matrix.name])
            if statistics is not None and self._rows[matrix.name][expert] == 0
        ]
        scores_EOI = torch.stack(
            [
                Magnitude().scores(weight_OI, None)
                if expert in unseen
                else self.criterion.scores(weight_OI, statistics)
                for expert, (weight_OI, statistics) in enumerate(
                    zip(matrix.by_expert(matrix.weight), self.by_name[matrix.name], strict=True)
                )
            ]
        )
        return scores_EOI, [matrix.label(expert) for expert in unseen]


class Pruner:
    """Makes the masks of one window after the other.

    Args:
        criterion: Scores weights.
        pattern: Turns scores into masks.
        chain: The chain at the current window.
        units: What is pruned at once, where that is not each window: each larger or smaller than the windows. They
            make a difference with sparse statistics only.
    """

    def __init__(self, criterion: Criterion, pattern: Pattern, chain: Chain, *, units: Sequence[Window] = ()) -> None:
        self.criterion, self.pattern, self.chain = criterion, pattern, chain
        self.units = units if chain.regime.statistics == "sparse" else ()
        self._around: Window | None = None  # the unit larger than a window in which the walk is
        self._masks: dict[str, Tensor] = {}  # of the unit or the window in work
        self._by_magnitude: dict[str, list[str]] = {}

    @property
    def by_magnitude(self) -> list[str]:
        """Labels of the experts that saw no token and were scored by magnitude."""
        return [label for labels in self._by_magnitude.values() for label in labels]

    @property
    def labels(self) -> dict[str, list[str]]:
        """The same by matrix."""
        return self._by_magnitude

    @property
    def pending(self) -> tuple[str, dict[str, Tensor]] | None:
        """Name and masks of the unit, larger than a window, in which the walk is."""
        return (self._around.name, self._masks) if self._around is not None else None

    def resume(self, pending: tuple[str, dict[str, Tensor]] | None, labels: Mapping[str, list[str]]) -> None:
        """Go on where another pruner had these `pending` masks and `labels`."""
        self._by_magnitude = dict(labels)
        if pending is not None:
            (self._around,) = [unit for unit in self.units if unit.name == pending[0]]
            self._masks = pending[1]

    def prepare(self, span: Window) -> None:
        """Before a window's weights are brought in: make all masks of a larger unit that starts here."""
        around = next((unit for unit in self.units if _names(span) < _names(unit)), None)
        if around is not None and around is not self._around:
            assert self.chain.sparse
            with float32_on(around, self.chain.compute.device):
                self._masks = self._score_at(around, self.chain.sparse)
        self._around = around

    def gather(self, span: Window, also: Watching = watching_nothing) -> None:
        """The chain's dense pass over a window, and the masks of all its matrices; smaller units are pruned here.

        Args:
            span: The window, with its dense weights.
            also: What else watches the pass.
        """
        smaller = [unit for unit in self.units if _names(unit) < _names(span)]
        if smaller or self._around:
            self.chain.dense_pass(span, also)
            if smaller:
                self._masks = self._prune_units(smaller)
            return
        statistics = Statistics(self.criterion, span.matrices())

        @contextmanager
        def watching(part: str) -> Iterator[None]:
            with statistics.watching(part), also(part):
                yield

        self.chain.dense_pass(span, watching)
        self._masks = self._score(span, statistics)

    @torch.no_grad()
    def prune(self, matrices: Sequence[Matrix]) -> dict[str, Tensor]:
        """Zero the weights that the criterion finds least important, in place; the masks (True = kept) by name."""
        masks = {
            matrix.name: self._masks[matrix.name].to(matrix.weight.device)  # a resumed unit's are on the CPU
            for matrix in matrices
            if matrix.name in self._masks
        }
        for matrix in matrices:
            if matrix.name in masks:
                matrix.weight.mul_(masks[matrix.name])
        return masks

    def _prune_units(self, units: Sequence[Window]) -> dict[str, Tensor]:
        """Score and prune units one after the other, each with what the pruned ones before it hand on; all masks."""
        assert self.chain.sparse
        boundary = Boundary(self.chain.copy(self.chain.sparse.states_STD))
        masks: dict[str, Tensor] = {}
        for unit in units:
            self._masks = self._score_at(unit, boundary)
            masks |= self.prune(unit.matrices())
            self.chain.step_over(boundary, unit)
        return masks

    def _score_at(self, unit: Window, boundary: Boundary) -> dict[str, Tensor]:
        """The masks of a unit by statistics of a pass that starts at `boundary`."""
        statistics = Statistics(self.criterion, unit.matrices())
        self.chain.run(unit, boundary.states_STD, None, statistics.watching, CALIBRATION)
        return self._score(unit, statistics)

    @torch.no_grad()
    def _score(self, unit: Window, statistics: Statistics) -> dict[str, Tensor]:
        """The masks of a unit's matrices, where they can be scored."""
        masks = {}
        for matrix in unit.matrices():
            if matrix.input_dim is not None:
                scores_EOI, self._by_magnitude[matrix.name] = statistics.scores(matrix)
                mask_EOI = torch.stack([self.pattern(scores_OI) for scores_OI in scores_EOI])
                masks[matrix.name] = matrix.as_weight(mask_EOI)
        return masks


def check_units(units: Sequence[Window], windows: Sequence[AnyWindow]) -> None:
    """Check that what is pruned at once is nested with what is reconstructed at once.

    Raises:
        ValueError: A window and a unit overlap in part.
    """
    for span in {id(window.span): window.span for window in windows}.values():
        names = _names(span)
        for unit in units:
            common = _names(unit) & names
            if common and common not in (names, _names(unit)):
                raise ValueError(
                    f"prune_by: {unit.name} and window {span.name} overlap in part; expected one in the other."
                )


def _names(window: Window) -> set[str]:
    return {matrix.name for matrix in window.matrices()}
