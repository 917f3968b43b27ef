"""Pruning a window's matrices in place: statistics, scores, masks; also at another granularity than the windows.

With dense statistics a mask depends on nothing but its own matrix's inputs in the dense model, so that it does not
matter how much is pruned at once. With sparse statistics it does: the matrices of a pruning window are scored while
none of them is pruned yet. Pruning windows may be larger or smaller than the windows that are reconstructed:

    larger    all masks are made where the first window of the pruning window starts (`begin`)
    smaller   one after the other, each on what the pruned ones before it output (`masks`)
"""

import math
from collections.abc import Mapping, Sequence

import torch
from lightning import seed_everything
from torch import Tensor

from lit_recon.activations.boundary import Boundary
from lit_recon.activations.chain import Chain
from lit_recon.activations.passes import CALIBRATION
from lit_recon.model.layerwise import float32_on
from lit_recon.model.windows import AnyWindow, Window
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.patterns import Pattern
from lit_recon.pruning.statistics import Statistics
from lit_recon.system.clock import Clock, timed


@torch.no_grad()
def prune(window: AnyWindow, masks: Mapping[str, Tensor]) -> bool:
    """Zero the weights of a window that their masks (True = kept) remove, in place; whether that changed any."""
    changed = False
    for matrix in window.matrices():
        if matrix.name in masks:
            changed |= bool(((matrix.weight != 0) & ~masks[matrix.name]).any())
            matrix.weight.mul_(masks[matrix.name]).add_(0.0)  # which makes zeros of negative zeros
    return changed


class Pruner:
    """Makes the masks of one window after the other.

    Args:
        criterion: Scores weights.
        pattern: Turns scores into masks.
        chain: The chain at the current window.
        pruning_windows: What is pruned at once, where that is not each window: each larger or smaller than the windows.
            They make a difference with sparse statistics only.
        seed: Seed of what statistics and scores draw; each window adds the index of its first layer.
        clock: Takes the seconds.

    Attributes:
        by_magnitude: By matrix, labels of the experts that saw no token and were scored by magnitude.
        has_pruned: Whether weights were zeroed already as the last masks were made, one pruning window after the other.
    """

    def __init__(
        self,
        criterion: Criterion,
        pattern: Pattern,
        chain: Chain,
        *,
        pruning_windows: Sequence[Window] = (),
        seed: int = 0,
        clock: Clock | None = None,
    ) -> None:
        self.criterion, self.pattern, self.chain = criterion, pattern, chain
        self.pruning_windows = pruning_windows if chain.propagation.statistics == "sparse" else ()
        self.seed = seed
        self.clock = clock or Clock()
        self.by_magnitude: dict[str, list[str]] = {}
        self.has_pruned = False
        self._larger: Window | None = None  # the pruning window, larger than a window, in which the walk is
        self._masks: dict[str, Tensor] = {}  # of that pruning window

    def labels(self) -> list[str]:
        """Labels of all experts that were scored by magnitude."""
        return [label for labels in self.by_magnitude.values() for label in labels]

    @property
    def pending(self) -> tuple[str, dict[str, Tensor]] | None:
        """Name and masks of the pruning window, larger than a window, in which the walk is."""
        return (self._larger.name, self._masks) if self._larger is not None else None

    def resume(self, pending: tuple[str, dict[str, Tensor]] | None, by_magnitude: Mapping[str, list[str]]) -> None:
        """Continue where another pruner had these `pending` masks and labels."""
        self.by_magnitude = dict(by_magnitude)
        if pending is not None:
            (self._larger,) = [window for window in self.pruning_windows if window.name == pending[0]]
            self._masks = pending[1]

    @timed("teacher")
    def begin(self, window: Window) -> None:
        """Make all masks of a larger pruning window that starts here, before the first window's weights are moved.

        Seeds what statistics and scores draw, by the window alone, so that a run can be resumed.
        """
        seed_everything(self.seed + window.indices.start, verbose=False)
        larger = next((one for one in self.pruning_windows if _names(window) < _names(one)), None)
        if larger is not None and larger is not self._larger:
            assert self.chain.sparse
            with float32_on(larger, self.chain.passes.compute.device):
                self._masks = self._masks_at(larger, self.chain.sparse)
        self._larger = larger

    def statistics(self, window: Window) -> Statistics:
        """Observes the dense pass over a window; of nothing where pruning windows have statistics of their own."""
        own = self._larger is None and not self._smaller(window)
        return Statistics(self.criterion, window.matrices() if own else ())

    @timed("prune")
    def masks(self, window: Window, statistics: Statistics) -> dict[str, Tensor]:
        """Masks of a window's matrices by name, on their weights' device; of those that can be scored.

        Args:
            window: The window, dense, on the device.
            statistics: What `statistics` gave, after the dense pass.
        """
        self.has_pruned = False
        if self._larger is not None:
            found = self._masks
        elif smaller := self._smaller(window):
            found = self._masks_in_turn(smaller)
        else:
            found = self._score(window, statistics)
        device = self.chain.passes.compute.device  # a resumed pruning window's masks are on the CPU
        return {matrix.name: found[matrix.name].to(device) for matrix in window.matrices() if matrix.name in found}

    def _smaller(self, window: Window) -> list[Window]:
        """The pruning windows in a window that is larger."""
        return [one for one in self.pruning_windows if _names(one) < _names(window)]

    def _masks_in_turn(self, pruning_windows: Sequence[Window]) -> dict[str, Tensor]:
        """Score and prune one pruning window after the other, each on what the pruned ones before it output."""
        assert self.chain.sparse
        passes = self.chain.passes
        boundary = Boundary(passes.copy(self.chain.sparse.states_STD))
        masks: dict[str, Tensor] = {}
        for window in pruning_windows:
            found = self._masks_at(window, boundary)
            self.has_pruned |= prune(window, found)
            masks |= found
            self.chain.step_over(boundary, window)
        return masks

    def _masks_at(self, window: Window, boundary: Boundary) -> dict[str, Tensor]:
        """The masks of a window by statistics of a pass that starts at `boundary`."""
        statistics = Statistics(self.criterion, window.matrices())
        self.chain.passes.run(window, boundary.states_STD, None, [statistics], CALIBRATION)
        return self._score(window, statistics)

    @torch.no_grad()
    def _score(self, window: Window, statistics: Statistics) -> dict[str, Tensor]:
        """The masks of a window's matrices, where they can be scored.

        What is zero already is the first to go, and goes even where the pattern would have room for it.
        """
        masks = {}
        for matrix in window.matrices():
            if matrix.input_dim is not None:
                scores_EOI, self.by_magnitude[matrix.name] = statistics.scores(matrix)
                zero_EOI = matrix.by_expert(matrix.weight) == 0
                if zero_EOI.any():
                    scores_EOI = torch.where(zero_EOI, -math.inf, scores_EOI)
                mask_EOI = torch.stack([self.pattern(scores_OI) for scores_OI in scores_EOI])
                masks[matrix.name] = matrix.as_weight(mask_EOI & ~zero_EOI)
        return masks


def check_nested(pruning_windows: Sequence[Window], windows: Sequence[AnyWindow]) -> None:
    """Check that what is pruned at once is nested with what is reconstructed at once.

    Raises:
        ValueError: A window and a pruning window overlap in part.
    """
    for window in {id(one.enclosing): one.enclosing for one in windows}.values():
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
