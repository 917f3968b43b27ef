"""Inputs of single matrices, observed in passes of their layer: what they are trained on.

    Activations      inputs and products, kept: for modules that train by gradient
    NormalEquations  X^T X and Y^T X alone (gram.py): for least squares, summed in the same pass as the criterion's
                     statistics where all inputs are dense

On sparse or mixed inputs the matrices of the layer that are done have their places in it (partial_layer.py).

Matrices with the same input, such as q, k and v, share its pass or its sums. The experts of a fused matrix have rows
of their own; as samples, rows are cut to the chain's number of positions, the last sample padded.

Shapes: S samples, T positions, N rows, E experts, O outputs, I inputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lit_recon.activations.chain import Chain
from lit_recon.activations.datamodule import Activations
from lit_recon.activations.gram import GramSums, InputSums, NormalEquations, PairedSums, summing_products
from lit_recon.activations.partial_layer import PartialLayer
from lit_recon.activations.passes import SAMPLE_PARTS, Batching
from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import Store
from lit_recon.model.decoder import LayerCall
from lit_recon.model.matrices import Matrix
from lit_recon.model.products import Product, SharedInputs, observing_products
from lit_recon.model.windows import MatrixWindow, Window
from lit_recon.system.transfer import put

_PIECE_BYTES = 2**26  # of rows that are kept together


def check_experts(matrices: Sequence[Matrix], propagation: Propagation) -> None:
    """Raise a ValueError for single matrices of experts whose inputs and targets would be of different tokens."""
    experts = [matrix.name for matrix in matrices if matrix.experts > 1]
    if experts and propagation.corrects:
        raise ValueError(
            f"chain.inputs={propagation.inputs} with chain.targets=dense and windows=matrix: experts see other tokens "
            f"in the sparse chain than in the dense one ({len(experts)} such matrices, for example {experts[0]}); use "
            "chain.targets=local, or larger windows."
        )


class _Captured(NamedTuple):
    """Inputs as samples: the expert of each row, which rows are real, and the number of calibration samples."""

    inputs_STI: Tensor
    experts_ST: Tensor
    valid_ST: Tensor | None
    num_samples: int


class MatrixInputs:
    """Inputs of the matrices of one layer, and what each is trained on.

    Args:
        layer: The window of the layer, dense, on the device.
        chain: The chain at the layer.

    Attributes:
        done: The matrices that are fitted.
    """

    def __init__(self, layer: Window, chain: Chain) -> None:
        self.layer = layer
        self.chain = chain
        self.done: list[MatrixWindow] = []
        self._shared = SharedInputs()
        self._names: set[str] = set()  # the matrices whose inputs are captured now
        self._captured: tuple[_Captured, ...] = ()  # what they are trained on, and where their targets come from
        self._sums: dict[str, dict[str, list[GramSums]]] = {part: {} for part in SAMPLE_PARTS}
        self._knows_shared = False
        self._latest: tuple[str, InputSums] | None = None  # where inputs are not dense: of the matrices that one leads

    def activations(self, window: MatrixWindow) -> Activations | None:
        """The inputs and products of one matrix, in the layer run on the chain's inputs; None if it is not reached.

        That is where no calibration or no held-out token is routed to an expert that is a module of its own.
        """
        if window.matrix.name not in self._names:
            self._captured = ()  # before the next ones are made
            self._learn_shared()
            captured = [self._capture(window, self.chain.inputs_STD, self._done_in_place)]
            if not self.chain.propagation.one_source:
                assert self.chain.dense
                captured.append(self._capture(window, self.chain.dense.states_STD, ()))
            reached = [rows for rows in captured if rows is not None]
            if len(reached) < len(captured):
                self._names = set()
                return None
            self._captured = tuple(reached)
            self._names = self._shared.led(self._shared[window.matrix.name])
        inputs, sources = self._captured[0], self._captured[-1]
        calls = _calls(inputs.experts_ST) if window.matrix.experts > 1 else _no_calls
        batching = replace(
            self.chain.passes.batching, num_samples=inputs.num_samples, calls=calls, valid_ST=inputs.valid_ST
        )
        products_STO, energies_ST = _own_products(window, sources.inputs_STI, batching)
        return Activations(inputs.inputs_STI, products_STO, batching, energies_ST)

    def forget(self) -> None:
        """Release the inputs that are kept."""
        self._names, self._captured, self._latest = set(), (), None

    @property
    def _done_in_place(self) -> Sequence[MatrixWindow]:
        """The matrices that stand in the layer as they are now where it runs on what is trained on."""
        return () if self.chain.propagation.inputs == "dense" else self.done

    @torch.no_grad()
    def _learn_shared(self) -> None:
        """Learn on one sample which matrices have the same input."""
        if self._knows_shared:
            return
        self._knows_shared = True
        passes, row_B = self.chain.passes, torch.arange(1)
        inputs_BTD = passes.store.load(self.chain.inputs_STD, slice(0, 1), passes.compute.device)

        def note(product: Product) -> None:
            self._shared.leader_of(product)

        with passes.compute.autocast(), observing_products(self.layer.matrices(), note):
            self.layer(inputs_BTD, passes.batching.calls(row_B))

    def _capture(self, window: MatrixWindow, states_STD: Tensor, done: Sequence[MatrixWindow]) -> _Captured | None:
        """What a matrix is multiplied by while the layer runs on these states; None: nothing in one of the parts."""
        passes, partial = self.chain.passes, PartialLayer(self.layer, window.matrix, done)
        capture = _Capture(partial, passes.store)
        passes.run(partial.forward_with_done, states_STD, None, [capture])
        reached = all(rows.count for rows in capture.rows.values())
        return _as_samples(capture.rows, passes.tokens_ST.shape[1], passes.store) if reached else None

    @contextmanager
    def observing(self, part: str) -> Iterator[None]:
        """Sum up the Gram matrices of all inputs in a pass of the layer on the inputs that it is trained on."""
        with summing_products(self.layer.matrices(), self._shared, self._sums[part]):
            yield

    def of(self, matrix: Matrix) -> list[GramSums] | None:
        """The sums over calibration samples for a matrix, of each expert; None if it was in no product."""
        return self._sums["calibration"].get(self._shared[matrix.name])

    def normal_equations(self, window: MatrixWindow) -> NormalEquations | None:
        """The normal equations of one matrix, whose weight is still dense; None if no token reaches it."""
        calibration, held_out = (self._sums_of(window, part) for part in SAMPLE_PARTS)
        return NormalEquations.from_sums(window, calibration, held_out) if calibration and held_out else None

    def _sums_of(self, window: MatrixWindow, part: str) -> list[PairedSums]:
        """The sums for a matrix, of each expert; none if no token reaches it."""
        if self.chain.propagation.inputs == "dense":  # they were observed
            return [PairedSums.of_one(sums) for sums in self._sums[part].get(self._shared[window.matrix.name], [])]
        self._learn_shared()
        leader = self._shared[window.matrix.name]
        if self._latest is None or self._latest[0] != leader:
            self._latest = None  # before the next ones are made
            self._latest = leader, self._sum_up(window)
        return self._latest[1].of(part)

    def _sum_up(self, window: MatrixWindow) -> InputSums:
        """Sum up what a matrix is multiplied by, in passes of its own."""
        passes, chain = self.chain.passes, self.chain
        partial, has_sources = PartialLayer(self.layer, window.matrix, self.done), not chain.propagation.one_source
        sums = InputSums(partial, has_sources=has_sources)
        if has_sources:
            assert chain.dense
            passes.run_in_turn(sums.forward, [chain.dense.states_STD, chain.inputs_STD], sums)
        else:
            passes.run(sums.forward, chain.inputs_STD, None, [sums])
        return sums


def _no_calls(rows_B: Tensor) -> list[LayerCall]:
    return []


def _calls(experts_ST: Tensor) -> Callable[[Tensor], list[LayerCall]]:
    return lambda rows_B: [LayerCall(kwargs={"experts": experts_ST[rows_B]})]


class _Capture:
    """Observes passes of a layer up to one of its matrices, and keeps what that is multiplied by.

    Attributes:
        rows: The matrix's inputs, by part of the samples.
    """

    def __init__(self, partial: PartialLayer, store: Store) -> None:
        self.partial = partial
        self.rows = {part: _RowPieces(store) for part in SAMPLE_PARTS}

    @contextmanager
    def observing(self, part: str) -> Iterator[None]:
        """Keep the rows of a part."""

        def note(product: Product) -> None:
            self.rows[part].add(product.rows_NI, product.expert)
            self.partial.saw(product)

        with observing_products([self.partial.matrix], note):
            yield
        self.rows[part].put_away()


class _RowPieces:
    """Rows of one matrix's inputs as they come, in pieces: an array of a store may be a file, and products are small.

    Attributes:
        count: How many rows there are.
        width: Their length; 0 before the first.
    """

    def __init__(self, store: Store) -> None:
        self.count, self.width = 0, 0
        self._new_bytes = 0
        self._store = store
        self._new: list[tuple[Tensor, Tensor]] = []  # rows, and the expert of each
        self._pieces: list[tuple[Tensor, Tensor]] = []  # the same, in the store

    def add(self, rows_NI: Tensor, expert: int) -> None:
        """Add rows of one expert."""
        if not len(rows_NI):
            return
        rows_NI = rows_NI.to(self._store.dtype, copy=True).to(self._store.device)
        self._new.append((rows_NI, torch.full((len(rows_NI),), expert)))
        self.count, self.width = self.count + len(rows_NI), rows_NI.shape[1]
        self._new_bytes += rows_NI.nbytes
        if self._new_bytes >= _PIECE_BYTES:
            self.put_away()

    def put_away(self) -> None:
        """Move all of them to the store."""
        if not self._new:
            return
        piece_NI = self._store.zeros((sum(len(new_NI) for new_NI, _ in self._new), self.width))
        torch.cat([new_NI for new_NI, _ in self._new], out=piece_NI)
        self._pieces.append((piece_NI, torch.cat([experts_N for _, experts_N in self._new])))
        self._new, self._new_bytes = [], 0
        self._store.release(piece_NI, slice(None))

    def pop_all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces in order; each is released when the next is taken."""
        while self._pieces:
            yield self._pieces.pop(0)


def _as_samples(rows: dict[str, _RowPieces], length: int, store: Store) -> _Captured:
    """Rows as samples of `length` positions; the last of each part is padded. `rows` is empty afterwards."""
    samples = {part: -(-one.count // length) for part, one in rows.items()}
    width = max(one.width for one in rows.values())
    total = sum(samples.values()) * length
    inputs_NI = store.zeros((total, width))
    experts_N, valid_N = torch.zeros(total, dtype=torch.long), torch.zeros(total, dtype=torch.bool)
    end = 0
    for part, one in rows.items():
        start, end = end, end + samples[part] * length
        for piece_NI, expert_N in one.pop_all():
            here = slice(start, start + len(piece_NI))
            inputs_NI[here], experts_N[here], valid_N[here] = piece_NI, expert_N, True
            store.release(inputs_NI, here)
            start = here.stop
    valid_ST = None if valid_N.all() else valid_N.view(-1, length)
    return _Captured(inputs_NI.unflatten(0, (-1, length)), experts_N.view(-1, length), valid_ST, samples["calibration"])


@torch.no_grad()
def _own_products(window: MatrixWindow, inputs_STI: Tensor, batching: Batching) -> tuple[Tensor, Tensor]:
    """The matrix's products with these inputs, (S, T, O), and the energy of each, (S, T)."""
    (matrix,) = window.matrices()
    outputs = matrix.by_expert(matrix.weight).shape[1]
    samples, length, _ = inputs_STI.shape
    products_STO = batching.store.zeros((samples, length, outputs))
    energies_ST = torch.zeros(samples, length, device=batching.compute.device)
    for rows in batching.batches(0, len(inputs_STI)):
        inputs_BTI = batching.store.load(inputs_STI, rows, batching.compute.device)
        with batching.compute.autocast():
            products_BTO = window(inputs_BTI, batching.calls(torch.arange(rows.start, rows.stop))).float()
        put(products_STO[rows], products_BTO)
        energies_ST[rows] = products_BTO.square().mean(-1)
        batching.store.release(inputs_STI, rows)
        batching.store.release(products_STO, rows)
    batching.store.settle()
    return products_STO, energies_ST
