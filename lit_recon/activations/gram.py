"""Gram matrices of a matrix's inputs: all that its squared error depends on, whatever the number of samples.

    || X W^T - Y ||^2 = tr(W G W^T) - 2 tr(W B^T) + ||Y||^2      G = X^T X      B = Y^T X

Targets are products of the dense matrix V with sources S, mostly X itself, so that B = V S^T X and ||Y||^2 =
tr(V S^T S V^T) need no products either, and matrices with the same inputs share all sums.

Medians over rows come from a sample of the rows, which is kept.

Shapes: N rows, E experts, O outputs, I inputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lit_recon.activations.partial_layer import PartialLayer
from lit_recon.model.decoder import LayerCall
from lit_recon.model.errors import Errors, unit_of
from lit_recon.model.matrices import Matrix
from lit_recon.model.products import Product, SharedInputs, observing_products
from lit_recon.model.windows import AnyWindow, MatrixWindow

SAMPLED = 1024  # rows of a matrix that are kept
_STRIPE = 256  # rows of a Gram matrix that are summed up together
_AT_ONCE = 64  # of those that come at once: a sample of many batches, not of the first


@dataclass
class GramSums:
    """The sum over rows of inputs of their products (I, I) in float32, their number, and a sample of them.

    Attributes:
        upper_II: The sum, in stripes from the diagonal to the right: the rest is the same, and half the work is saved.
        most: How many rows are kept.
        count: How many there were.
        sampled: Those that are kept, (N, I) each.
    """

    upper_II: Tensor
    most: int = SAMPLED
    count: int = 0
    sampled: list[Tensor] = field(default_factory=list)
    _is_whole: bool = True  # whether the left of the diagonal is filled in

    @classmethod
    def zero(cls, width: int, device: torch.device, *, experts: int = 1, sampled: int = SAMPLED) -> "GramSums":
        """Of no rows of one of some experts, which share what is kept."""
        return cls(torch.zeros(width, width, device=device), -(-sampled // experts))

    @property
    def gram_II(self) -> Tensor:
        """The whole sum: one tensor as long as nothing is added."""
        if not self._is_whole:
            for stripe in self._stripes():
                self.upper_II[stripe.stop :, stripe] = self.upper_II[stripe, stripe.stop :].T
            self._is_whole = True
        return self.upper_II

    def _stripes(self) -> Iterator[slice]:
        """Rows that are summed up together."""
        width = len(self.upper_II)
        return (slice(start, min(start + _STRIPE, width)) for start in range(0, width, _STRIPE))

    def add(self, rows_NI: Tensor) -> None:
        """Add rows; products in float32 also under autocast, whose 16 bits the solution would not survive."""
        with torch.autocast(rows_NI.device.type, enabled=False):
            rows_NI = rows_NI.float()
            for stripe in self._stripes():
                self.upper_II[stripe, stripe.start :].addmm_(rows_NI[:, stripe].T, rows_NI[:, stripe.start :])
        self._is_whole = False
        self.count += len(rows_NI)
        room = self.most - sum(map(len, self.sampled))
        if room > 0 and len(rows_NI):
            self.sampled.append(_some(rows_NI, min(room, _AT_ONCE)).clone())


@contextmanager
def summing_products(
    matrices: Sequence[Matrix], shared: SharedInputs, sums: dict[str, list[GramSums]], *, sampled: int = SAMPLED
) -> Iterator[None]:
    """A context in which the inputs of all products by some matrices are summed up, those that are shared once.

    Args:
        matrices: The matrices.
        shared: Learns which of them share their inputs.
        sums: Takes the sums, of each expert, by the name of the matrix that leads.
        sampled: Rows of a matrix that are kept.
    """

    def note(product: Product) -> None:
        name, experts = product.matrix.name, product.matrix.experts
        if shared.leader_of(product) == name:
            if name not in sums:
                width, device = product.inputs.shape[-1], product.inputs.device
                sums[name] = [GramSums.zero(width, device, experts=experts, sampled=sampled) for _ in range(experts)]
            sums[name][product.expert].add(product.rows_NI)

    with observing_products(matrices, note):
        yield


@dataclass
class PairedSums:
    """Sums over pairs of rows: of the inputs, of the sources of the targets, and of one by the other (I, I) in float32.

    Attributes:
        inputs: Of the inputs.
        sources: Of what the dense matrix makes targets of; the same object where that is the inputs.
        cross_II: Of sources (first) by inputs.
    """

    inputs: GramSums
    sources: GramSums
    cross_II: Tensor

    @classmethod
    def zero(cls, width: int, device: torch.device) -> "PairedSums":
        """Of no rows."""
        return cls(GramSums.zero(width, device), GramSums.zero(width, device), torch.zeros(width, width, device=device))

    @classmethod
    def of_one(cls, sums: GramSums) -> "PairedSums":
        """Where the sources are the inputs."""
        return cls(sums, sums, sums.gram_II)

    def add(self, sources_NI: Tensor, inputs_NI: Tensor) -> None:
        """Add pairs of rows, of one token each."""
        self.sources.add(sources_NI)
        self.inputs.add(inputs_NI)
        with torch.autocast(inputs_NI.device.type, enabled=False):
            self.cross_II.addmm_(sources_NI.float().T, inputs_NI.float())


class InputSums:
    """Observes passes of a layer up to one of its matrices, and sums up what that is multiplied by.

    Where targets are products with other inputs, the sources, two passes run in turn (`Passes.run_in_turn`): the dense
    layer over the dense hidden states, then the layer with what is done over those that it is trained on.

    Args:
        partial: The layer up to the matrix.
        has_sources: Whether the first of two passes is over sources.

    Attributes:
        turn: Which of both runs now: 0 for the sources, 1 for the inputs.
        pairs: With sources: the sums, by part of the samples.
        sums: Else: the sums of each expert, by part of the samples.
    """

    def __init__(self, partial: PartialLayer, *, has_sources: bool) -> None:
        self.turn = 0
        self.pairs: dict[str, PairedSums] = {}
        self.sums: dict[str, list[GramSums]] = {}
        self._partial, self._has_sources = partial, has_sources
        self._sources: list[Tensor] = []  # of the batch, until its inputs come

    def of(self, part: str) -> list[PairedSums]:
        """The sums of a part of the samples, of each expert; none if no token reached the matrix."""
        if self._has_sources:
            return [self.pairs[part]] if part in self.pairs else []
        return [PairedSums.of_one(sums) for sums in self.sums.get(part, [])]

    def forward(self, hidden_BTD: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        """The layer as far as it is run, dense for sources."""
        if self._has_sources and self.turn == 0:
            return self._partial.forward(hidden_BTD, calls)
        return self._partial.forward_with_done(hidden_BTD, calls)

    @contextmanager
    def observing(self, part: str) -> Iterator[None]:
        """Sum up in a part of the samples."""

        def note(product: Product) -> None:
            rows_NI, device = product.rows_NI, product.inputs.device
            if not self._has_sources:
                experts = product.matrix.experts
                if part not in self.sums:
                    width = rows_NI.shape[1]
                    self.sums[part] = [GramSums.zero(width, device, experts=experts) for _ in range(experts)]
                self.sums[part][product.expert].add(rows_NI)
            elif self.turn == 0:
                self._sources.append(rows_NI.clone())  # the layer may change them
            else:
                sources_NI = self._sources.pop(0)
                assert len(sources_NI) == len(rows_NI), f"{product.matrix.name} sees other tokens in the two passes"
                if part not in self.pairs:
                    self.pairs[part] = PairedSums.zero(rows_NI.shape[1], device)
                self.pairs[part].add(sources_NI, rows_NI)
            self._partial.saw(product)

        with observing_products([self._partial.matrix], note):
            yield


class QuadraticError(NamedTuple):
    """The squared error of a matrix as a quadratic function of its weights, summed over the rows of some samples.

    Attributes:
        gram_EII: G, of each expert.
        cross_EOI: B, of each expert.
        square: ||Y||^2 over all rows.
        num_rows: Number of rows.
        sampled: Some rows of inputs (N, I) and of targets (N, O), of each expert.
    """

    gram_EII: Tensor
    cross_EOI: Tensor
    square: Tensor
    num_rows: Tensor
    sampled: list[tuple[Tensor, Tensor]]

    def error(self, weight_EOI: Tensor) -> Tensor:
        """Mean squared error of the matrix's products, per row and output; in float64, since large terms cancel."""
        weight_EOI, gram_EII, cross_EOI = (tensor.double() for tensor in (weight_EOI, self.gram_EII, self.cross_EOI))
        total = ((weight_EOI @ gram_EII - 2 * cross_EOI) * weight_EOI).sum() + self.square
        return total.clamp(min=0) / self.num_rows / weight_EOI.shape[1]

    def errors(self, weight_EOI: Tensor, unit: float) -> Errors:
        """The mean error, of all rows, and the typical one, the median of the sampled rows."""
        by_row = [
            (inputs_NI @ weight_OI.T - targets_NO).square().mean(-1)
            for weight_OI, (inputs_NI, targets_NO) in zip(weight_EOI, self.sampled, strict=True)
        ]
        return Errors(self.error(weight_EOI).item() / unit, torch.cat(by_row).median().item() / unit)

    def unit(self) -> float:
        """Median over the sampled rows of the energy of the product."""
        return unit_of(torch.cat([targets_NO.square().mean(-1) for _, targets_NO in self.sampled]))


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
        cls, window: MatrixWindow, calibration: Sequence[PairedSums], held_out: Sequence[PairedSums]
    ) -> "NormalEquations":
        """Of the sums of each expert; `window` has its dense weight, whose products are the targets."""
        return cls(_quadratic(window, calibration), _quadratic(window, held_out))

    def unit(self) -> float:
        """Median over calibration rows of the energy of the dense product: the unit of errors."""
        return self.calibration.unit()

    def calibration_errors(self, window: AnyWindow, unit: float) -> Errors:
        """Errors of the matrix on the calibration samples."""
        return self.calibration.errors(_weight_of(window), unit)

    def held_out_errors(self, window: AnyWindow, unit: float) -> Errors:
        """Errors of the matrix on the held-out samples."""
        return self.held_out.errors(_weight_of(window), unit)

    def errors(self, window: AnyWindow, unit: float) -> tuple[Errors, Errors]:
        """Errors of the matrix on the calibration and on the held-out samples."""
        return self.calibration_errors(window, unit), self.held_out_errors(window, unit)

    def data_module(self, seed: int) -> "NormalEquationsDataModule":
        """Serves them to a Trainer."""
        return NormalEquationsDataModule(self)


def _weight_of(window: AnyWindow) -> Tensor:
    """The weight of a window's only matrix, (E, O, I)."""
    (matrix,) = window.matrices()
    return matrix.by_expert(matrix.weight.detach())


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


def _some(rows: Tensor, most: int) -> Tensor:
    """At most so many of some rows, evenly spaced; a view."""
    return rows[:: max(1, -(-len(rows) // most))]


@torch.no_grad()
def _quadratic(window: MatrixWindow, sums: Sequence[PairedSums]) -> QuadraticError:
    (matrix,) = window.matrices()
    weight_EOI = matrix.by_expert(matrix.weight)
    gram_EII = torch.stack([one.inputs.gram_II for one in sums])
    cross_EOI = weight_EOI.double() @ torch.stack([one.cross_II for one in sums]).double()
    of_sources_EOI = cross_EOI
    if any(one.sources is not one.inputs for one in sums):
        of_sources_EOI = weight_EOI.double() @ torch.stack([one.sources.gram_II for one in sums]).double()
    square = (of_sources_EOI * weight_EOI).sum()
    count = torch.tensor(max(1, sum(one.inputs.count for one in sums)), dtype=torch.float64, device=weight_EOI.device)
    sampled = []
    for weight_OI, one in zip(weight_EOI, sums, strict=True):
        none_NI = weight_OI.new_zeros(0, weight_OI.shape[1])
        inputs_NI, sources_NI = (torch.cat([none_NI, *those.sampled]) for those in (one.inputs, one.sources))
        sampled.append((inputs_NI, sources_NI @ weight_OI.T))
    return QuadraticError(gram_EII, cross_EOI.float(), square, count, sampled)
