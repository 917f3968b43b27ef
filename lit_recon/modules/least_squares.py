"""Least squares, exact, for one matrix: the weights with the smallest error under its mask, from Gram matrices alone.

    min over W of  || X W^T - Y ||^2 / unit   with W zero where the mask is      (solved in conjugate_gradients.py)

The data are one batch, the normal equations of the calibration samples (gram.py), so that no activations are kept and
no optimizer is needed. TensorBoard shows the error, with what damping adds, over the iterations of the solver.
"""

import math
from collections.abc import Callable, Mapping

from lightning import LightningModule
from torch import Tensor

from lit_recon.activations.gram import QuadraticError
from lit_recon.model.windows import MatrixWindow
from lit_recon.modules.conjugate_gradients import DAMPING, solve_damped


class LeastSquares(LightningModule):
    """One matrix, solved for in a single step.

    Args:
        window: The pruned matrix.
        masks: Its boolean mask (True = kept), by the matrix's name.
        unit: Unit of the errors that are logged: the median over rows of the energy of the dense product.
        damping: Pull of each weight towards its start, in units of its input's energy; where the Gram matrix is not
            positive definite in float32, ten times as much, up to 1.
        tolerance: Share of what a row of the matrix could gain that the solver may leave.
        max_iterations: Bound on its iterations.

    Attributes:
        note: Remark for the window's result: the damping that was needed, where that is more.

    Raises:
        ValueError: One of these is out of range.
    """

    needs_gram = True  # it is trained on normal equations (activations/gram.py) instead of activations

    def __init__(
        self,
        window: MatrixWindow,
        masks: Mapping[str, Tensor],
        unit: float,
        *,
        damping: float = DAMPING,
        tolerance: float = 1e-3,
        max_iterations: int = 200,
    ) -> None:
        super().__init__()
        if type(damping) not in (int, float) or not 0 < damping < math.inf:
            raise ValueError(f"module.damping={damping}: expected a number above 0, such as 0.1.")
        if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
            raise ValueError(f"module.tolerance={tolerance}: expected a share of what can be gained, 0 to below 1.")
        if type(max_iterations) is not int or max_iterations < 1:
            raise ValueError(f"module.max_iterations={max_iterations}: expected a number of at least 1.")
        self.automatic_optimization = False
        self.window = window
        self.masks = masks
        self.unit = unit
        self.damping, self.tolerance, self.max_iterations = damping, tolerance, max_iterations
        self.note = ""

    def training_step(self, batch: QuadraticError, batch_idx: int) -> None:
        """Solve for each expert's weights (a plain matrix has one) and put them in place."""
        (matrix,) = self.window.matrices()
        weight_EOI = matrix.by_expert(matrix.weight.detach())  # a view
        mask_EOI = matrix.by_expert(self.masks[matrix.name].to(weight_EOI.device))
        start = batch.error(weight_EOI).item()
        scale = batch.num_rows.item() * weight_EOI.shape[1] * self.unit

        def note(iteration: int, gained: float) -> None:
            if self.logger and len(weight_EOI) == 1:
                self.logger.log_metrics({"loss/train": start / self.unit - gained / scale}, iteration)

        for weight_OI, mask_OI, gram_II, cross_OI in zip(
            weight_EOI, mask_EOI, batch.gram_EII, batch.cross_EOI, strict=True
        ):
            weight_OI.copy_(self._solution(weight_OI, mask_OI, gram_II, cross_OI, on_iteration=note))

    def _solution(self, *problem: Tensor, on_iteration: Callable[[int, float], None]) -> Tensor:
        """The solution with as little damping as the Gram matrix allows."""
        limits = {"tolerance": self.tolerance, "max_iterations": self.max_iterations, "on_iteration": on_iteration}
        solution, damping = solve_damped(*problem, damping=self.damping, **limits)
        if damping != self.damping:
            self.note = f"damped by {damping:g}: its Gram matrix is not positive definite in float32"
        return solution

    def validation_step(self, batch: QuadraticError, batch_idx: int) -> None:
        """The relative error on held-out samples."""
        (matrix,) = self.window.matrices()
        error = batch.error(matrix.by_expert(matrix.weight.detach())) / self.unit
        self.log("loss/held_out", error.float(), batch_size=1)

    def configure_optimizers(self) -> None:
        """None: the solution is exact."""
