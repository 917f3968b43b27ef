"""What single matrices are trained on: their inputs, observed in passes of their layer, which is still dense.

    Activations     inputs and products, kept: for modules that train by gradient
    Moments         X^T X and Y^T X alone: for least squares, gathered in the same pass as the criterion's statistics

Matrices with the same input, such as q, k and v, share its pass or its moments. The experts of a fused matrix have rows
of their own; as samples, rows are cut to the chain's number of positions, the last sample padded.

Shapes: S samples, T positions, N rows, E experts, O outputs, I inputs.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lit_recon.activations.chain import PARTS, Chain
from lit_recon.activations.datamodule import Activations
from lit_recon.activations.gram import Moments, Sums
from lit_recon.activations.propagation import Regime
from lit_recon.activations.store import Store
from lit_recon.model.decoder import LayerCall
from lit_recon.model.matrices import Matrix, Product, observed
from lit_recon.model.windows import MatrixWindow, Window


def check_regime(matrices: Sequence[Matrix], regime: Regime) -> None:
    """Raise a ValueError for single matrices of experts whose inputs and targets would be of different tokens."""
    experts = [matrix.name for matrix in matrices if matrix.experts > 1]
    if experts and regime.corrects:
        raise ValueError(
            f"chain.inputs={regime.inputs} with chain.targets=dense and windows=matrix: experts see other tokens in "
            f"the sparse chain than in the dense one ({len(experts)} such matrices, for example {experts[0]}); use "
            "chain.targets=local, or larger windows."
        )


_PIECE_BYTES = 2**26  # of rows that are kept together
_REMEMBERED = 8  # inputs back that a matrix may share


class Leaders:
    """Which matrices have the same input: the first of them that is used leads the others."""

    def __init__(self) -> None:
        self._by_name: dict[str, str] = {}
        self._recent: list[tuple[weakref.ref, str]] = []

    def of(self, product: Product) -> str:
        """Name of the matrix that leads the one of this product; its own where it leads."""
        name = product.matrix.name
        leader = next((other for inputs, other in self._recent if inputs() is product.inputs), name)
        if leader == name and product.matrix.experts == 1:
            self._recent = [*self._recent[-_REMEMBERED:], (weakref.ref(product.inputs), name)]
        return self._by_name.setdefault(name, leader)

    def led(self, leader: str) -> set[str]:
        """Names of all matrices with the input of `leader`."""
        return {name for name, other in self._by_name.items() if other == leader}

    def __getitem__(self, name: str) -> str:
        """Name of the matrix that leads another; its own where it leads or was never used."""
        return self._by_name.get(name, name)


class _Captured(NamedTuple):
    """Inputs as samples: the expert of each row, which rows are real, and the number of calibration samples."""

    inputs_STI: Tensor
    experts_ST: Tensor
    valid_ST: Tensor | None
    num_samples: int


class MatrixData:
    """Makes what the matrices of one layer are trained on.

    Args:
        layer: The window of the layer, brought in, dense.
        chain: The chain at the layer.
    """

    def __init__(self, layer: Window, chain: Chain) -> None:
        self.layer = layer
        self.chain = chain
        self._leaders = Leaders()
        self._names: set[str] = set()  # the matrices whose inputs are captured now
        self._captured: tuple[_Captured, ...] = ()  # what they are trained on, and where their targets come from
        self._sums: dict[str, dict[str, list[Sums]]] = {part: {} for part in PARTS}

    def activations(self, window: MatrixWindow) -> Activations | None:
        """The inputs and products of one matrix, in the layer run on the chain's inputs; None if it is not reached.

        That is where no calibration or no held-out token is routed to an expert that is a module of its own.
        """
        if window.matrix.name not in self._names:
            self._captured = ()  # before the next ones are made
            states = [self.chain.inputs_STD]
            if not self.chain.regime.one_source:
                assert self.chain.dense
                states.append(self.chain.dense.states_STD)
            captured = [self._capture(window, states_STD) for states_STD in states]
            reached = [rows for rows in captured if rows is not None]
            if len(reached) < len(captured):
                self._names = set()
                return None
            self._captured = tuple(reached)
            self._names = self._leaders.led(self._leaders[window.matrix.name])
        inputs, sources = self._captured[0], self._captured[-1]
        calls = _calls(inputs.experts_ST) if window.matrix.experts > 1 else _no_calls
        return Activations(
            inputs.inputs_STI,
            _products(window, sources.inputs_STI, calls, self.chain),
            inputs.valid_ST,
            calls,
            inputs.num_samples,
            self.chain.batch_size,
            self.chain.compute,
            self.chain.store,
        )

    def _capture(self, window: MatrixWindow, states_STD: Tensor) -> _Captured | None:
        """What a matrix is multiplied by while the layer runs on these states; None: nothing in one of the parts."""
        store = self.chain.store
        rows = {part: _Rows(store) for part in PARTS}

        @contextmanager
        def watching(part: str) -> Iterator[None]:
            def observe(product: Product) -> None:
                self._leaders.of(product)
                if product.matrix.name == window.matrix.name:
                    rows[part].add(product.rows_NI, product.expert)

            with observed(self.layer.matrices(), observe):
                yield
            rows[part].put_away()

        self.chain.run(self.layer, states_STD, None, watching)
        seen = all(one.count for one in rows.values())
        return _as_samples(rows, self.chain.tokens_ST.shape[1], store) if seen else None

    @contextmanager
    def watching(self, part: str) -> Iterator[None]:
        """Gather the moments of all matrices' inputs in a pass of the layer on the inputs that they are trained on."""

        def observe(product: Product) -> None:
            name, experts = product.matrix.name, product.matrix.experts
            if self._leaders.of(product) == name:
                width, device = product.inputs.shape[-1], product.inputs.device
                sums = self._sums[part].setdefault(name, [Sums.zero(width, device) for _ in range(experts)])
                sums[product.expert].add(product.rows_NI)

        with observed(self.layer.matrices(), observe):
            yield

    def moments(self, window: MatrixWindow) -> Moments | None:
        """What least squares needs to know of one matrix, whose weight is still dense; None if it is not reached."""
        if self.chain.regime.one_source:
            calibration, held_out = (self._sums[part].get(self._leaders[window.matrix.name]) for part in PARTS)
            return Moments.of_products(window, calibration, held_out) if calibration and held_out else None
        activations = self.activations(window)
        return Moments.of_activations(activations) if activations else None


def _no_calls(rows_B: Tensor) -> list[LayerCall]:
    return []


def _calls(experts_ST: Tensor) -> Callable[[Tensor], list[LayerCall]]:
    return lambda rows_B: [LayerCall(kwargs={"experts": experts_ST[rows_B]})]


class _Rows:
    """Rows of one matrix as they come, kept in pieces: an array of a store may be a file, and each product gives few.

    Attributes:
        count: How many there are.
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
        rows_NI = rows_NI.to("cpu", self._store.dtype, copy=True)
        self._new.append((rows_NI, torch.full((len(rows_NI),), expert)))
        self.count, self.width = self.count + len(rows_NI), rows_NI.shape[1]
        self._new_bytes += rows_NI.nbytes
        if self._new_bytes >= _PIECE_BYTES:
            self.put_away()

    def put_away(self) -> None:
        """Have all of them in the store."""
        if not self._new:
            return
        piece_NI = self._store.zeros((sum(len(new_NI) for new_NI, _ in self._new), self.width))
        torch.cat([new_NI for new_NI, _ in self._new], out=piece_NI)
        self._pieces.append((piece_NI, torch.cat([experts_N for _, experts_N in self._new])))
        self._new, self._new_bytes = [], 0
        self._store.release(piece_NI, slice(None))

    def taken(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces in order, each of them gone when the next one comes."""
        while self._pieces:
            yield self._pieces.pop(0)


def _as_samples(rows: dict[str, _Rows], length: int, store: Store) -> _Captured:
    """Rows as samples of `length` positions; the last of each part is padded. Of `rows` nothing is left."""
    samples = {part: -(-one.count // length) for part, one in rows.items()}
    width = max(one.width for one in rows.values())
    total = sum(samples.values()) * length
    inputs_NI = store.zeros((total, width))
    experts_N, valid_N = torch.zeros(total, dtype=torch.long), torch.zeros(total, dtype=torch.bool)
    end = 0
    for part, one in rows.items():
        start, end = end, end + samples[part] * length
        for piece_NI, expert_N in one.taken():
            here = slice(start, start + len(piece_NI))
            inputs_NI[here], experts_N[here], valid_N[here] = piece_NI, expert_N, True
            store.release(inputs_NI, here)
            start = here.stop
    valid_ST = None if valid_N.all() else valid_N.view(-1, length)
    return _Captured(inputs_NI.unflatten(0, (-1, length)), experts_N.view(-1, length), valid_ST, samples["calibration"])


@torch.no_grad()
def _products(
    window: MatrixWindow, inputs_STI: Tensor, calls: Callable[[Tensor], list[LayerCall]], chain: Chain
) -> Tensor:
    """The matrix's products with these inputs, (S, T, O)."""
    (matrix,) = window.matrices()
    outputs = matrix.by_expert(matrix.weight).shape[1]
    products_STO = chain.store.zeros((*inputs_STI.shape[:2], outputs))
    for rows_B in torch.arange(len(inputs_STI)).split(chain.batch_size):
        here = slice(int(rows_B[0]), int(rows_B[-1]) + 1)
        inputs_BTI = inputs_STI[here].to(chain.compute.device).float()
        with chain.compute.autocast():
            products_STO[here] = window(inputs_BTI, calls(rows_B))
        chain.store.release(inputs_STI, here)
        chain.store.release(products_STO, here)
    return products_STO
