"""Steps of the walk: a window; or a layer with all its matrices, which stays dense until the last of them is done.

A step says what observes its dense pass, and what each of its windows is trained on.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Protocol

from lit_recon.activations.chain import Chain
from lit_recon.activations.datamodule import Activations
from lit_recon.activations.gram import NormalEquations
from lit_recon.activations.matrix_inputs import MatrixInputs
from lit_recon.activations.passes import CALIBRATION, Observer
from lit_recon.activations.window_grams import Grams, WindowGrams
from lit_recon.model.windows import AnyWindow, MatrixWindow, Window

TrainingData = Activations | NormalEquations


class Step(Protocol):
    """What the chain steps over at once.

    Attributes:
        window: The window between whose ends it steps.
        observers: Look at the dense pass, besides the criterion's statistics.
    """

    window: Window
    observers: Sequence[Observer]

    def training_data(self) -> Iterator[tuple[AnyWindow, TrainingData | None]]:
        """Each window to be pruned and fitted, in order, and what it is trained on.

        None where no token reaches it, or where it is not one of those that are chosen (`is_chosen`).
        """

    def observed_grams(self) -> Grams | None:
        """Gram matrices that its observers sum up in the dense pass; None where they do not."""

    def grams(self) -> Grams | None:
        """Gram matrices of what its matrices are multiplied by, while it is dense; None where nothing is solved for."""

    def install(self) -> None:
        """Put what was fitted in copies into the model."""


class WindowStep:
    """A window of layers, or a half."""

    def __init__(self, window: Window, chain: Chain, *, solves_first: bool) -> None:
        self.window, self.chain = window, chain
        self._grams = WindowGrams(window.matrices()) if solves_first else None
        self.observers: Sequence[Observer] = _shares_pass(self._grams, chain)

    def training_data(self) -> Iterator[tuple[AnyWindow, TrainingData | None]]:
        """The window and the chain's activations."""
        yield self.window, Activations.from_chain(self.chain) if self.window.is_chosen else None

    def observed_grams(self) -> Grams | None:
        """Those of its matrices."""
        return self._grams if self.observers else None

    def grams(self) -> Grams | None:
        """Those of its matrices, which are not kept."""
        grams, self._grams = self._grams, None
        return _gathered(grams, self.window, self.chain)

    def install(self) -> None:
        """Nothing to do: the window is fitted in place."""


class MatrixStep:
    """The matrices of a layer, each fitted in a copy, one after the other (partial_layer.py).

    Args:
        window: The window of the layer.
        matrices: Its matrices.
        chain: The chain at the layer.
        needs_gram: Whether they are trained on normal equations rather than on activations.
        solves_first: Whether they are solved for before they are trained.
    """

    def __init__(
        self,
        window: Window,
        matrices: Sequence[MatrixWindow],
        chain: Chain,
        *,
        needs_gram: bool,
        solves_first: bool,
    ) -> None:
        self.window, self.matrices, self.chain = window, matrices, chain
        self.needs_gram = needs_gram
        self.inputs = MatrixInputs(window, chain)
        propagation = chain.propagation
        # One pass serves targets, statistics and Gram matrices where all of them are of the same inputs; where
        # inputs are not dense, each input has passes of its own.
        self.observers: Sequence[Observer] = [self.inputs] if needs_gram and propagation.independent else ()
        self._own_pass = needs_gram and propagation.inputs == "dense" and not propagation.independent
        self._grams = WindowGrams(window.matrices()) if solves_first else None
        self.observers = [*self.observers, *_shares_pass(self._grams, chain)]
        self._gathered: Grams | None = None

    def training_data(self) -> Iterator[tuple[AnyWindow, TrainingData | None]]:
        """Each matrix, with a copy of its weight to work on, and its normal equations or its activations."""
        clock, passes = self.chain.clock, self.chain.passes
        if self._own_pass:
            with clock.phase("teacher"):
                passes.run(self.window, self.chain.inputs_STD, None, [self.inputs])
        for matrix in self.matrices:
            data: TrainingData | None = None
            if matrix.is_chosen:
                with clock.phase("teacher"):
                    data = self.inputs.normal_equations(matrix) if self.needs_gram else self.inputs.activations(matrix)
            matrix.open()
            yield matrix, data
            del data  # before the next matrix's activations are made
            self.inputs.done.append(matrix)

    def observed_grams(self) -> Grams | None:
        """Those that they are solved for from."""
        if not self.observers:
            return None
        return self.inputs if self._grams is None else self._grams

    def grams(self) -> Grams | None:
        """Those of all matrices of the layer."""
        if self._gathered is None:
            self._gathered = _gathered(self._grams, self.window, self.chain)
        return self._gathered

    def install(self) -> None:
        """Put the weights of all matrices into the layer."""
        for matrix in self.matrices:
            matrix.install()
        self.inputs.forget()


def _shares_pass(grams: WindowGrams | None, chain: Chain) -> list[Observer]:
    """Gram matrices that are summed up in the dense pass, where that is of the inputs that a window is trained on."""
    return [grams] if grams and chain.propagation.independent else []


def _gathered(grams: WindowGrams | None, window: Window, chain: Chain) -> WindowGrams | None:
    """Gram matrices of the inputs that a window is trained on, of a pass of their own where the dense one was not."""
    if grams and not chain.propagation.independent:
        with chain.clock.phase("teacher"), window.with_dense_norms():
            chain.passes.run(window, chain.inputs_STD, None, [grams], CALIBRATION)
    return grams


def steps(
    windows: Sequence[AnyWindow], chain: Chain, *, needs_gram: bool, solves_first: bool = False
) -> Iterator[tuple[Step, range]]:
    """The steps over some windows in order, each with the indices of the layers that come after it.

    Args:
        windows: The windows.
        chain: The chain at the first of them, and at each step's window when that is taken.
        needs_gram: Whether single matrices are trained on normal equations.
        solves_first: Whether matrices are solved for before windows are trained.
    """
    groups = [(window, list(members)) for window, members in groupby(windows, key=lambda window: window.enclosing)]
    upcoming = [*(window.indices for window, _ in groups[1:]), range(0)]
    for (window, members), following in zip(groups, upcoming, strict=False):  # of no windows, nothing comes
        matrices = [member for member in members if isinstance(member, MatrixWindow)]
        if matrices:
            yield MatrixStep(window, matrices, chain, needs_gram=needs_gram, solves_first=solves_first), following
        else:
            yield WindowStep(window, chain, solves_first=solves_first), following
