"""Survey of the dense model before the walk: each layer with statistics of its inputs, one after the other.

An allocation looks at all layers before it says how much each loses: at their scores, or at the errors that pruning
them would make. A survey is one pass over the calibration samples, with one layer at a time on the device.

Shapes: S samples, T tokens, D hidden size, O outputs, I inputs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from lightning import seed_everything
from torch import Tensor

from lit_recon.activations.passes import CALIBRATION, Passes
from lit_recon.model.layerwise import float32_on
from lit_recon.model.matrices import Matrix
from lit_recon.model.windows import Window
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.decision import decide
from lit_recon.pruning.patterns import Pattern
from lit_recon.pruning.statistics import InputStatistics


class SurveyedLayer:
    """One dense layer, on the device, with statistics of its inputs.

    Args:
        window: The layer.
        criterion: Scores its weights.
        statistics: Of its inputs.
        error_of: The error of the layer as it is now against the dense one, on a few samples.
    """

    def __init__(
        self, window: Window, criterion: Criterion, statistics: InputStatistics, error_of: Callable[[], float]
    ) -> None:
        self.window, self._criterion, self._statistics, self._error_of = window, criterion, statistics, error_of
        self.matrices = [matrix for matrix in window.matrices() if matrix.input_dim is not None]

    @property
    def size(self) -> int:
        """Weights that can be pruned."""
        return sum(matrix.weight.numel() for matrix in self.matrices)

    @torch.no_grad()
    def scores(self) -> Iterator[tuple[str, Tensor]]:
        """Scores (O, I) of each matrix or expert, by its label; -inf where a weight is zero already."""
        for matrix in self.matrices:
            for expert, weight_OI in enumerate(matrix.by_expert(matrix.weight)):
                seen, was_reached = self._statistics.for_criterion(matrix, expert)
                criterion = self._criterion if was_reached else Magnitude()
                scores_OI = criterion.scores(weight_OI, seen if was_reached else None)
                yield matrix.label(expert), torch.where(weight_OI == 0, -math.inf, scores_OI)

    @torch.no_grad()
    def error(self, pattern: Pattern) -> float:
        """Error of the layer pruned by a pattern: of the typical token, in units of the dense layer's update."""
        dense = [matrix.weight.clone() for matrix in self.matrices]
        try:
            for matrix in self.matrices:
                matrix.weight.copy_(self._pruned(matrix, pattern))
            return self._error_of()
        finally:
            for matrix, weight in zip(self.matrices, dense, strict=True):
                matrix.weight.copy_(weight)

    def _pruned(self, matrix: Matrix, pattern: Pattern) -> Tensor:
        """The weights of a matrix after pruning."""
        made = []
        for expert, weight_OI in enumerate(matrix.by_expert(matrix.weight)):
            decided = decide(
                matrix, expert, self._statistics, criterion=self._criterion, pattern=pattern, refinement=None
            )
            left = weight_OI if decided.weight_OI is None else decided.weight_OI
            made.append(left * decided.mask_OI)
        return matrix.as_weight(torch.stack(made))


@dataclass(frozen=True)
class Survey:
    """The dense model, whose layers can be looked at in order, more than once.

    Attributes:
        layers: Its layers.
        passes: Runs them over the calibration samples.
        states_STD: Hidden states before the first of them.
        seed: Of what statistics and scores draw.
    """

    layers: Sequence[Window]
    passes: Passes
    states_STD: Tensor
    seed: int

    def each(self, criterion: Criterion, *, num_samples: int = 0) -> Iterator[SurveyedLayer]:
        """Each layer in turn; all of it is gone when the next is taken.

        Args:
            criterion: Gathers statistics, and scores.
            num_samples: Calibration samples, the first ones, on which errors can be measured.
        """
        passes, states_STD = self.passes, None
        for window in self.layers:
            seed_everything(self.seed + window.indices.start, verbose=False)
            with float32_on(window, passes.compute.device):
                statistics = InputStatistics(criterion, window.matrices())
                if statistics.observes or num_samples:
                    states_STD = passes.copy(self.states_STD) if states_STD is None else states_STD
                    inputs_STD = states_STD[:num_samples].clone()
                    passes.run(window, states_STD, states_STD, [statistics], CALIBRATION)
                    error_of = _ErrorOf(window, passes, inputs_STD, states_STD[:num_samples].clone())
                    yield SurveyedLayer(window, criterion, statistics, error_of)
                else:
                    yield SurveyedLayer(window, criterion, statistics, _not_measured)


class _ErrorOf:
    """Median over tokens of a window's squared error, in units of the median energy of the dense window's update."""

    def __init__(self, window: Window, passes: Passes, inputs_STD: Tensor, outputs_STD: Tensor) -> None:
        self.window, self.passes = window, passes
        self.inputs_STD, self.outputs_STD = inputs_STD.float(), outputs_STD.float()

    @torch.no_grad()
    def __call__(self) -> float:
        """The error of the window as it is now."""
        errors, energies = [], []
        for index, (inputs_TD, outputs_TD) in enumerate(zip(self.inputs_STD, self.outputs_STD, strict=True)):
            rows = torch.tensor([index])
            valid_ST = self.passes.batching.valid_ST
            length = len(inputs_TD) if valid_ST is None else int(valid_ST[index].sum())
            calls = self.passes.decoder.calls(self.passes.tokens_ST[rows, :length])
            inputs_BTD = inputs_TD[None, :length].to(self.passes.compute.device)
            with self.passes.compute.autocast():
                found_TD = self.window(inputs_BTD, calls).float()[0].cpu()
            errors.append((found_TD - outputs_TD[:length].cpu()).square().mean(-1))
            energies.append((outputs_TD[:length] - inputs_TD[:length]).square().mean(-1))
        unit = torch.cat(energies).median().clamp(min=torch.finfo(torch.float32).tiny)
        return float(torch.cat(errors).median() / unit)


def _not_measured() -> float:
    raise AssertionError("a survey without samples measures no errors")


@runtime_checkable
class Allocation(Protocol):
    """Shares out how much is removed, over layers or matrices."""

    def check(self, pattern: Pattern) -> None:
        """Raise a ValueError for a pattern whose sparsity it cannot share out."""

    def describe(self) -> str:
        """In the words of the settings, for a run's recipe."""

    def allocate(self, survey: Survey, criterion: Criterion, pattern: Pattern) -> dict[str, list[Pattern]]:
        """The pattern of each matrix, or of each of its experts, by the matrix's name."""
