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

import torch
from torch import Tensor

from lit_recon.activations import Activations
from lit_recon.blocks import LayerCall
from lit_recon.chain import Chain
from lit_recon.matrices import Product, observed
from lit_recon.moments import Moments, Sums
from lit_recon.regime import Regime
from lit_recon.windows import AnyWindow, MatrixWindow, Window


def check_regime(windows: Sequence[AnyWindow], regime: Regime) -> None:
    """Raise a ValueError for single matrices of experts whose inputs and targets would be of different tokens."""
    experts = [window.name for window in windows if isinstance(window, MatrixWindow) and window.matrix.experts > 1]
    if experts and regime.targets == "dense" and regime.inputs != "dense":
        raise ValueError(
            f"chain.inputs={regime.inputs} with chain.targets=dense and windows=matrix: experts see other tokens in "
            f"the sparse chain than in the dense one ({len(experts)} such matrices, for example {experts[0]}); use "
            "chain.targets=local, or larger windows."
        )


class _Rows:
    """The inputs of some matrices of a layer, as rows, for calibration and held-out samples."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.inputs: dict[str, list[Tensor]] = {}
        self.experts: dict[str, list[Tensor]] = {}

    def add(self, part: str, product: Product) -> None:
        """Keep the rows of one product."""
        rows_NI = product.rows_NI
        if product.matrix.experts > 1:
            rows_NI = rows_NI[rows_NI.any(1)]  # zero where a layer gives every expert every token
        self.inputs.setdefault(part, []).append(rows_NI.float().cpu())
        self.experts.setdefault(part, []).append(torch.full((len(rows_NI),), product.expert))


class MatrixData:
    """Makes what the matrices of one layer are trained on.

    Args:
        layer: The window of the layer, brought in, dense.
        chain: The chain at the layer.
    """

    def __init__(self, layer: Window, chain: Chain) -> None:
        self.layer = layer
        self.chain = chain
        self._names: set[str] = set()  # whose inputs are those that are kept now
        self._kept: tuple[Tensor, Tensor, Tensor | None, int] | None = None
        self._sums: dict[str, dict[str, list[Sums]]] = {"calibration": {}, "held_out": {}}
        self._leader: dict[str, str] = {}

    def activations(self, window: MatrixWindow) -> Activations:
        """The inputs and products of one matrix, in the layer run on the chain's inputs."""
        if window.matrix.name not in self._names:
            self._kept = None
            self._names, self._kept = self._capture(window, self.chain.inputs_STD)
        assert self._kept
        inputs_STI, experts_ST, valid_ST, num_samples = self._kept
        sources_STI = inputs_STI
        if not self.one_source:
            assert self.chain.dense
            sources_STI = self._capture(window, self.chain.dense.states_STD)[1][0]
        calls = _calls(experts_ST) if window.matrix.experts > 1 else _no_calls
        made = Activations(
            sources_STI, sources_STI, valid_ST, calls, num_samples, self.chain.batch_size, self.chain.compute
        )
        made.targets_STD = _products(window, made)
        made.inputs_STD = inputs_STI
        return made

    def _capture(
        self, window: MatrixWindow, states_STD: Tensor
    ) -> tuple[set[str], tuple[Tensor, Tensor, Tensor | None, int]]:
        """Names of the matrices with this input; inputs, expert of each row, validity, number of samples."""
        kept, same = _Rows({window.matrix.name}), {window.matrix.name}
        last: list[tuple[str, Tensor]] = []

        @contextmanager
        def watching(part: str) -> Iterator[None]:
            def observe(product: Product) -> None:
                if product.matrix.name == window.matrix.name:
                    kept.add(part, product)
                last.append((product.matrix.name, product.inputs))
                mine = [inputs for name, inputs in last if name == window.matrix.name]
                same.update(name for name, inputs in last if mine and inputs is mine[-1])
                del last[:-_REMEMBERED]

            with observed(self.layer.matrices(), observe):
                yield

        self.chain.run(self.layer, states_STD, None, watching)
        length = self.chain.tokens_ST.shape[1]
        chunks = [
            _chunks(torch.cat(kept.inputs[part]), torch.cat(kept.experts[part]), length)
            for part in ("calibration", "held_out")
        ]
        inputs_STI, experts_ST, valid_ST = (torch.cat(tensors) for tensors in zip(*chunks, strict=True))
        return same, (inputs_STI, experts_ST, None if valid_ST.all() else valid_ST, len(chunks[0][0]))

    @contextmanager
    def watching(self, part: str) -> Iterator[None]:
        """Gather the moments of all matrices' inputs in a pass of the layer on the inputs that they are trained on."""
        recent: list[tuple[weakref.ref, str]] = []

        def observe(product: Product) -> None:
            name = product.matrix.name
            leader = next((other for ref, other in recent if ref() is product.inputs), name)
            if self._leader.setdefault(name, leader) != name:
                return
            if product.matrix.experts == 1:
                recent[:] = [*recent[-_REMEMBERED:], (weakref.ref(product.inputs), name)]
            sums = self._sums[part].setdefault(
                name,
                [Sums.zero(product.inputs.shape[-1], product.inputs.device) for _ in range(product.matrix.experts)],
            )
            sums[product.expert].add(product.rows_NI)

        with observed(self.layer.matrices(), observe):
            yield

    def moments(self, window: MatrixWindow) -> Moments:
        """What least squares needs to know of one matrix; its weight is still dense."""
        if self.one_source:
            leader = self._leader[window.matrix.name]
            return Moments.of_products(window, *(self._sums[part][leader] for part in ("calibration", "held_out")))
        return Moments.of_activations(window, self.activations(window))

    @property
    def one_source(self) -> bool:
        """Whether a matrix's targets are its dense products with the inputs that it is trained on."""
        return self.chain.regime.inputs == "dense" or self.chain.regime.targets == "local"


_REMEMBERED = 8  # products back that may have had the same input


def _no_calls(rows_B: Tensor) -> list[LayerCall]:
    return []


def _calls(experts_ST: Tensor) -> Callable[[Tensor], list[LayerCall]]:
    return lambda rows_B: [LayerCall(kwargs={"experts": experts_ST[rows_B]})]


def _chunks(rows_NI: Tensor, experts_N: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as samples of `length` positions, the expert of each, and which are rows: the last sample is padded."""
    missing = -len(rows_NI) % length
    valid_N = torch.ones(len(rows_NI), dtype=torch.bool)
    if missing:
        rows_NI = torch.cat([rows_NI, rows_NI.new_zeros(missing, rows_NI.shape[1])])
        experts_N = torch.cat([experts_N, experts_N.new_zeros(missing)])
        valid_N = torch.cat([valid_N, valid_N.new_zeros(missing)])
    return rows_NI.unflatten(0, (-1, length)), experts_N.view(-1, length), valid_N.view(-1, length)


@torch.no_grad()
def _products(window: MatrixWindow, activations: Activations) -> Tensor:
    """The matrix's products with the inputs of `activations`, (S, T, O)."""
    device, compute = activations.compute.device, activations.compute
    made = []
    for rows_B in torch.arange(len(activations.inputs_STD)).split(activations.batch_size):
        with compute.autocast():
            made.append(window(activations.inputs_STD[rows_B].to(device), activations.calls(rows_B)).float().cpu())
    return torch.cat(made)
