"""Statistics of the inputs of matrices: what a criterion sees of them, gathered in a pass over the calibration samples.

Shapes: E experts, O outputs, I inputs.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lit_recon.model.matrices import Matrix
from lit_recon.model.products import Product, observing_products
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.system.finite import NotFinite, first_not_finite


class Statistics:
    """Statistics of the inputs of some matrices, as a criterion gathers them, for each expert by itself.

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
        self.observed = [matrix for matrix in scored if self.by_name[matrix.name][0] is not None]
        self._rows = {matrix.name: [0] * matrix.experts for matrix in scored}

    def note(self, product: Product) -> None:
        """Add the inputs of one product."""
        name, expert, inputs_NI = product.matrix.name, product.expert, product.rows_NI
        self._rows[name][expert] += len(inputs_NI)
        self.by_name[name][expert] = self.criterion.update(self.by_name[name][expert], inputs_NI)

    def observing(self, part: str) -> AbstractContextManager:
        """The context in which products are observed; statistics never see held-out samples."""
        if part != "calibration" or not self.observed:
            return nullcontext()
        return observing_products(self.observed, self.note)

    def scores(self, matrix: Matrix) -> tuple[Tensor, list[str]]:
        """Scores (E, O, I), and the labels of the experts that saw no token and are scored by magnitude.

        Raises:
            NotFinite: A score is not finite.
        """
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
        if found := first_not_finite(scores_EOI):
            expert, output, feature = found
            statistics, label = self.by_name[matrix.name][expert], matrix.label(expert)
            overflown = isinstance(statistics, Tensor) and first_not_finite(statistics)
            what = "statistics of the inputs" if overflown else "scores"
            raise NotFinite(f"{what} of {label} are not finite, first for output {output} and input {feature}")
        return scores_EOI, [matrix.label(expert) for expert in unseen]
