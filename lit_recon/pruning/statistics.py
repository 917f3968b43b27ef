"""Statistics of the inputs of matrices: what criteria and refinements see of them, gathered in a pass over the samples.

What one gathers itself is its own; Gram matrices are summed up once for all that need them (window_grams.py), and once
for all matrices with the same input.

Shapes: E experts, O outputs, I inputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from lit_recon.activations.window_grams import Grams, WindowGrams
from lit_recon.model.matrices import Matrix
from lit_recon.model.products import Product, observing_products
from lit_recon.pruning.criteria import Criterion, needs_gram
from lit_recon.pruning.refine import Refinement


class Statistics:
    """Statistics of the inputs of some matrices, as one criterion or refinement gathers them, of each expert by itself.

    Args:
        gatherer: The criterion or the refinement.
        matrices: The matrices that will be pruned.
    """

    def __init__(self, gatherer: Criterion | Refinement, matrices: Sequence[Matrix]) -> None:
        self.gatherer = gatherer
        scored = [matrix for matrix in matrices if matrix.input_dim is not None]
        self.by_name = {
            matrix.name: [gatherer.start(weight_OI) for weight_OI in matrix.by_expert(matrix.weight)]
            for matrix in scored
        }
        self.observed = [matrix for matrix in scored if self.by_name[matrix.name][0] is not None]
        self._rows = {matrix.name: [0] * matrix.experts for matrix in scored}

    def note(self, product: Product) -> None:
        """Add the inputs of one product."""
        name, expert, inputs_NI = product.matrix.name, product.expert, product.rows_NI
        self._rows[name][expert] += len(inputs_NI)
        self.by_name[name][expert] = self.gatherer.update(self.by_name[name][expert], inputs_NI)

    def observing(self, part: str) -> AbstractContextManager:
        """The context in which products are observed; statistics never see held-out samples."""
        if part != "calibration" or not self.observed:
            return nullcontext()
        return observing_products(self.observed, self.note)

    def of(self, matrix: Matrix, expert: int) -> tuple[Any, bool]:
        """The statistics of one matrix or expert, and whether there are any that it should have: it saw a token."""
        found = self.by_name[matrix.name][expert]
        return found, found is None or self._rows[matrix.name][expert] > 0


class InputStatistics:
    """Statistics for a criterion and a refinement together, observed in one pass.

    Args:
        criterion: The criterion.
        matrices: The matrices that will be pruned.
        refinement: Refines masks; None where nothing does.
        grams: Gram matrices that something else sums up in the same pass.
    """

    def __init__(
        self,
        criterion: Criterion,
        matrices: Sequence[Matrix],
        *,
        refinement: Refinement | None = None,
        grams: Grams | None = None,
    ) -> None:
        self._criterion = Statistics(criterion, matrices)
        self._refinement = None if refinement is None else Statistics(refinement, matrices)
        own = WindowGrams(matrices) if grams is None and any(map(needs_gram, (criterion, refinement))) else None
        self._grams = grams if own is None else own
        self._observers = [one for one in (self._criterion, self._refinement, own) if one is not None]

    @property
    def observes(self) -> bool:
        """Whether a pass is needed to gather them."""
        return any(not isinstance(one, Statistics) or one.observed for one in self._observers)

    @contextmanager
    def observing(self, part: str) -> Iterator[None]:
        """Gather all of them in a pass over calibration samples."""
        with ExitStack() as stack:
            for observer in self._observers:
                stack.enter_context(observer.observing(part))
            yield

    def for_criterion(self, matrix: Matrix, expert: int) -> tuple[Any, bool]:
        """What the criterion sees of one matrix or expert, and whether that saw the tokens that are needed for it."""
        return self._of(self._criterion, matrix, expert)

    def for_refinement(self, matrix: Matrix, expert: int) -> tuple[Any, bool]:
        """The same for the refinement."""
        assert self._refinement is not None
        return self._of(self._refinement, matrix, expert)

    def _of(self, statistics: Statistics, matrix: Matrix, expert: int) -> tuple[Any, bool]:
        if not needs_gram(statistics.gatherer):
            return statistics.of(matrix, expert)
        assert self._grams is not None
        sums = self._grams.of(matrix)
        return (None, False) if sums is None or not sums[expert].count else (sums[expert].gram_II, True)
