"""Gram matrices of a matrix's inputs: all that its squared error depends on, whatever the number of samples.

    || X W^T - Y ||^2 = tr(W G W^T) - 2 tr(W B^T) + ||Y||^2      G = X^T X      B = Y^T X

Shapes: N rows, E experts, O outputs, I inputs.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lit_recon.activations.datamodule import Activations
from lit_recon.model.windows import AnyWindow, MatrixWindow


@dataclass
class GramSums:
    """Running sums over rows of inputs, in float32: of their products (I, I), of the rows (I), and their number."""

    gram_II: Tensor
    sum_I: Tensor
    count: int = 0

    @classmethod
    def zero(cls, width: int, device: torch.device) -> "GramSums":
        """Of no rows."""
        return cls(torch.zeros(width, width, device=device), torch.zeros(width, device=device))

    def add(self, rows_NI: Tensor) -> None:
        """Add rows; products in float32 also under autocast, whose 16 bits the solution would not survive."""
        with torch.autocast(rows_NI.device.type, enabled=False):
            rows_NI = rows_NI.float()
            self.gram_II.addmm_(rows_NI.T, rows_NI)
            self.sum_I += rows_NI.sum(0)
        self.count += len(rows_NI)


class QuadraticError(NamedTuple):
    """The squared error of a matrix as a quadratic function of its weights, summed over the rows of some samples.

    Attributes:
        gram_EII: G, of each expert.
        cross_EOI: B, of each expert.
        square: ||Y||^2 over all rows.
        mean_square: Square of the mean of Y over all rows, summed over outputs.
        num_rows: Number of rows.
    """

    gram_EII: Tensor
    cross_EOI: Tensor
    square: Tensor
    mean_square: Tensor
    num_rows: Tensor

    def error(self, weight_EOI: Tensor) -> Tensor:
        """Mean squared error of the matrix's products, per row and output; in float64, since large terms cancel."""
        weight_EOI, gram_EII, cross_EOI = (tensor.double() for tensor in (weight_EOI, self.gram_EII, self.cross_EOI))
        total = ((weight_EOI @ gram_EII - 2 * cross_EOI) * weight_EOI).sum() + self.square
        return total.clamp(min=0) / self.num_rows / weight_EOI.shape[1]

    def variance(self) -> Tensor:
        """Variance of the targets around their mean per output."""
        return (self.square / self.num_rows - self.mean_square) / self.cross_EOI.shape[1]


@dataclass
class NormalEquations:
    """The normal equations of one matrix, for calibration and for held-out samples."""

    calibration: QuadraticError
    held_out: QuadraticError

    trainer_settings: ClassVar[dict[str, Any]] = {
        "max_epochs": 1,
        "max_steps": -1,
        "val_check_interval": 1.0,
        "log_every_n_steps": 1,
        "accumulate_grad_batches": 1,
        "gradient_clip_val": None,
        "precision": "32-true",  # the solver's products would not survive autocast to 16 bits
    }

    @classmethod
    def from_sums(
        cls, window: MatrixWindow, calibration: list[GramSums], held_out: list[GramSums]
    ) -> "NormalEquations":
        """Where the targets are the dense products: B = W G; `window` has its dense weight."""
        return cls(_of_products(window, calibration), _of_products(window, held_out))

    @classmethod
    def from_activations(cls, activations: Activations) -> "NormalEquations":
        """Where targets are of other inputs; of a plain matrix."""
        split = activations.batching.num_samples
        return cls(_of_activations(activations, slice(0, split)), _of_activations(activations, slice(split, None)))

    def variance(self) -> float:
        """Variance of the calibration targets around their mean per output: the unit of relative errors."""
        return self.calibration.variance().item()

    def errors(self, window: AnyWindow, variance: float) -> tuple[float, float]:
        """Relative errors of the matrix on the calibration and on the held-out samples."""
        (matrix,) = window.matrices()
        weight_EOI = matrix.by_expert(matrix.weight.detach())
        equations = (self.calibration, self.held_out)
        first, second = (one.error(weight_EOI).item() / variance for one in equations)
        return first, second

    def data_module(self, seed: int) -> "NormalEquationsDataModule":
        """Serves them to a Trainer."""
        return NormalEquationsDataModule(self)


class NormalEquationsDataModule(LightningDataModule):
    """One batch: the normal equations of a matrix."""

    def __init__(self, equations: NormalEquations) -> None:
        super().__init__()
        self.equations = equations

    def train_dataloader(self) -> DataLoader:
        """Of the calibration samples."""
        return DataLoader([self.equations.calibration], batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        """Of the held-out samples."""
        return DataLoader([self.equations.held_out], batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]


def _as_it_is(batch: Any) -> Any:
    return batch


@torch.no_grad()
def _of_products(window: MatrixWindow, sums: list[GramSums]) -> QuadraticError:
    (matrix,) = window.matrices()
    weight_EOI = matrix.by_expert(matrix.weight).double()
    gram_EII = torch.stack([one.gram_II for one in sums]).double()
    cross_EOI = weight_EOI @ gram_EII
    mean_O = torch.einsum("eoi,ei->o", weight_EOI, torch.stack([one.sum_I for one in sums]).double())
    count = torch.tensor(max(1, sum(one.count for one in sums)), dtype=torch.float64, device=weight_EOI.device)
    square, mean_square = (cross_EOI * weight_EOI).sum(), (mean_O / count).square().sum()
    return QuadraticError(gram_EII.float(), cross_EOI.float(), square, mean_square, count)


@torch.no_grad()
def _of_activations(activations: Activations, samples: slice) -> QuadraticError:
    batching, arrays_STD = activations.batching, (activations.inputs_STD, activations.targets_STD)
    device, (inputs, outputs) = batching.compute.device, (array_STD.shape[2] for array_STD in arrays_STD)
    gram_II, cross_OI = (torch.zeros(rows, inputs, device=device) for rows in (inputs, outputs))
    square, count = torch.zeros((), dtype=torch.float64, device=device), 0
    sum_O = torch.zeros(outputs, dtype=torch.float64, device=device)
    first, last, _ = samples.indices(len(activations.inputs_STD))
    for part in batching.batches(first, last):  # the arrays may be as large as a disk
        rows_NI, rows_NO = (activations.rows(array_STD, part).to(device) for array_STD in arrays_STD)
        gram_II.addmm_(rows_NI.T, rows_NI)
        cross_OI.addmm_(rows_NO.T, rows_NI)
        square += rows_NO.square().sum(dtype=torch.float64)
        sum_O += rows_NO.sum(0, dtype=torch.float64)
        count += len(rows_NI)
        for array_STD in arrays_STD:
            batching.store.release(array_STD, part)
    mean_square, num_rows = (sum_O / count).square().sum(), torch.tensor(count, dtype=torch.float64, device=device)
    return QuadraticError(gram_II[None], cross_OI[None], square, mean_square, num_rows)
