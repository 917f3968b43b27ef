"""Statistics, scores, masks: prune a window's matrices in place, or part of the model at another granularity.

With dense statistics a mask depends on nothing but its own matrix's inputs in the dense model, so that it does not
matter how much is pruned at once. With sparse statistics it does: what is pruned together is scored while none of it
is pruned yet. `Pruner` handles units that are larger or smaller than the windows.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from lit_recon.blocks import float32_on
from lit_recon.chain import CALIBRATION, Boundary, Chain, Watching, watching_nothing
from lit_recon.criteria import Criterion
from lit_recon.criteria.magnitude import Magnitude
from lit_recon.masks import Pattern
from lit_recon.matrices import Matrix, Product, observed
from lit_recon.windows import AnyWindow, Window


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
        if product.matrix.experts > 1:  # some layers give every expert every token, zero where it was not chosen
            inputs_NI = inputs_NI[inputs_NI.any(1)]
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

    Attributes:
        by_magnitude: Labels of the experts that saw no token and were scored by magnitude.
    """

    def __init__(self, criterion: Criterion, pattern: Pattern, chain: Chain, *, units: Sequence[Window] = ()) -> None:
        self.criterion, self.pattern, self.chain = criterion, pattern, chain
        self.units = units if chain.regime.statistics == "sparse" else ()
        self.by_magnitude: list[str] = []
        self._masks: dict[str, Tensor] = {}

    def prepare(self, span: Window) -> None:
        """Before a window's weights are brought in: make all masks of a larger unit that starts here."""
        names = _names(span)
        for unit in self.units:
            if names < _names(unit) and not names & set(self._masks):
                with float32_on(unit, self.chain.compute.device):
                    statistics = Statistics(self.criterion, unit.matrices())
                    assert self.chain.sparse
                    self.chain.run(unit, self.chain.sparse.states_STD, None, statistics.watching, CALIBRATION)
                    self._score(unit.matrices(), statistics)

    def gather(self, span: Window, also: Watching = watching_nothing) -> None:
        """The chain's dense pass over a window, and the masks of all its matrices; smaller units are pruned here.

        Args:
            span: The window, with its dense weights.
            also: What else watches the pass.
        """
        names = _names(span)
        smaller = [unit for unit in self.units if _names(unit) < names]
        if smaller or names & set(self._masks):
            self.chain.dense_pass(span, also)
            self._prune_units(smaller)
            return
        statistics = Statistics(self.criterion, span.matrices())

        @contextmanager
        def watching(part: str) -> Iterator[None]:
            with statistics.watching(part), also(part):
                yield

        self.chain.dense_pass(span, watching)
        self._score(span.matrices(), statistics)

    @torch.no_grad()
    def prune(self, matrices: Sequence[Matrix]) -> dict[str, Tensor]:
        """Zero the weights that the criterion finds least important, in place; the masks (True = kept) by name."""
        masks = {matrix.name: self._masks.pop(matrix.name) for matrix in matrices if matrix.name in self._masks}
        for matrix in matrices:
            if matrix.name in masks:
                matrix.weight.mul_(masks[matrix.name])
        return masks

    def _prune_units(self, units: Sequence[Window]) -> None:
        """Score and prune units one after the other, each with what the pruned ones before it hand on."""
        if not units:
            return
        assert self.chain.sparse
        boundary = Boundary(self.chain.sparse.states_STD.clone())
        for unit in units:
            statistics = Statistics(self.criterion, unit.matrices())
            self.chain.run(unit, boundary.states_STD, None, statistics.watching, CALIBRATION)
            for name, mask in self._score(unit.matrices(), statistics).items():
                next(matrix for matrix in unit.matrices() if matrix.name == name).weight.mul_(mask)
            outputs_STD = torch.zeros_like(boundary.states_STD)
            self.chain.run(unit, boundary.states_STD, outputs_STD)
            boundary.step(unit.branch, outputs_STD)

    @torch.no_grad()
    def _score(self, matrices: Sequence[Matrix], statistics: Statistics) -> dict[str, Tensor]:
        """The masks of matrices that can be scored, kept until they are pruned."""
        masks = {}
        for matrix in matrices:
            if matrix.input_dim is None:
                continue
            scores_EOI, by_magnitude = statistics.scores(matrix)
            masks[matrix.name] = matrix.as_weight(torch.stack([self.pattern(scores_OI) for scores_OI in scores_EOI]))
            self.by_magnitude += by_magnitude
        self._masks |= masks
        return masks


def check_units(units: Sequence[Window], windows: Sequence[AnyWindow]) -> None:
    """Check that what is pruned at once is nested with what is reconstructed at once.

    Raises:
        ValueError: A window and a unit overlap in part, or a unit is smaller than the layer that single matrices need.
    """
    for span in {id(window.span): window.span for window in windows}.values():
        names = _names(span)
        for unit in units:
            common = _names(unit) & names
            if common and common not in (names, _names(unit)):
                raise ValueError(
                    f"prune_by: {unit.name} and window {span.name} overlap in part; expected one in the other."
                )
            if common and common != names and any(window.span is not window for window in windows):
                raise ValueError(
                    "prune_by=half: single matrices are pruned in layers that stay dense; use block or model."
                )


def _names(window: Window) -> set[str]:
    return {matrix.name for matrix in window.matrices()}
