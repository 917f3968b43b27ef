"""Drift: how far the output of each matrix is from that of the dense model, over depth.

    local        ||x W' - x W||^2 / mean over tokens of ||x W||^2     only this matrix is replaced: dense inputs x
    accumulated  ||x' W' - x W||^2 / mean over tokens of ||x W||^2    all of the sparse model: its own inputs x'

as mean and maximum over tokens. Both models step through the layers together, one layer of each on the device. Biases
are not part of it. Which tokens reach an expert differs between the models: experts are measured locally alone.

Shapes: S samples, B samples of a batch, T tokens, D hidden size, N rows, O outputs, I inputs.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_recon.data.packing import PADDING
from lit_recon.model.decoder import Decoder, call_layer
from lit_recon.model.layerwise import float32_on
from lit_recon.model.matrices import Matrix, layer_matrices
from lit_recon.model.products import Product, observing_products
from lit_recon.system.device import Compute

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # in a name, the entry of a list, such as one of the experts


@dataclass(frozen=True)
class RelativeError:
    """Squared error of outputs of a matrix, in units of the mean energy of the dense ones.

    Attributes:
        mean: Mean over tokens.
        max: Of the worst token.
    """

    mean: float
    max: float


@dataclass(frozen=True)
class MatrixDrift:
    """Drift of one matrix.

    Attributes:
        matrix: Its name in the model.
        layer: Index of its layer.
        kind: Its name in the layer, without numbers: "mlp.up_proj".
        local: With the inputs of the dense model.
        accumulated: With the inputs of the sparse model; None where a token may reach another expert there.
    """

    matrix: str
    layer: int
    kind: str
    local: RelativeError
    accumulated: RelativeError | None

    def as_json(self) -> dict[str, Any]:
        """The entry of evaluations.json."""
        return asdict(self)


def measure_drift(
    dense: PreTrainedModel, sparse: PreTrainedModel, tokens_ST: Tensor, compute: Compute, *, batch_size: int = 1
) -> list[MatrixDrift]:
    """Drift of every matrix of a sparse model, in the order of depth; see `drift_of_layers`."""
    layers = drift_of_layers(dense, sparse, tokens_ST, compute, batch_size=batch_size)
    return [matrix for layer in layers for matrix in layer]


@torch.no_grad()
def drift_of_layers(
    dense: PreTrainedModel, sparse: PreTrainedModel, tokens_ST: Tensor, compute: Compute, *, batch_size: int = 1
) -> Iterator[list[MatrixDrift]]:
    """Drift of the matrices of one layer after the other, each as soon as it is measured.

    Args:
        dense: The dense model, in memory or mapped.
        sparse: A model with the same layers and other weights.
        tokens_ST: Token ids, PADDING at the end of a sample that holds less text.
        compute: Device and precision of the passes; outputs are compared in float32.
        batch_size: Samples per pass.

    Raises:
        ValueError: The models have other layers or matrices.
    """
    decoders = [Decoder(model, compute.device) for model in (dense, sparse)]
    check_alike(*decoders)
    batches = list(_batches(tokens_ST, batch_size))
    states = [_embedded(decoder, tokens_ST, batches) for decoder in decoders]
    without_accumulated = 0
    for index, (dense_layer, sparse_layer) in enumerate(zip(*(one.layers for one in decoders), strict=True)):
        with float32_on(dense_layer, compute.device), float32_on(sparse_layer, compute.device):
            layers = [_Layer(one, index, compute) for one in decoders]
            sums = {matrix.name: _Sums(compute.device) for matrix in layers[0].matrices}
            for rows, length in batches:
                tokens_BT = tokens_ST[rows, :length]
                products, theirs = (
                    layer.run(hidden_STD[rows, :length], tokens_BT)
                    for layer, hidden_STD in zip(layers, states, strict=True)
                )
                _compare(products, theirs, layers[1].by_name, sums, num_tokens=tokens_BT.numel())
        found = [sums[matrix.name].drift(matrix.name, index, decoders[0].prefix) for matrix in layers[0].matrices]
        measured = [drift for drift in found if drift is not None]
        without_accumulated += sum(drift.accumulated is None for drift in measured)
        yield measured
    if without_accumulated:
        log.info(
            "accumulated drift of %d matrices of experts is left out: the models may send a token to other experts",
            without_accumulated,
        )


def check_alike(dense: Decoder, sparse: Decoder) -> None:
    """Raise a ValueError where two models do not have the same layers with matrices of the same names and shapes."""
    shapes = [
        {
            matrix.name.removeprefix(f"{decoder.prefix}."): tuple(matrix.weight.shape)
            for index, layer in enumerate(decoder.layers)
            for matrix in layer_matrices(layer, f"{decoder.prefix}.{index}")
        }
        for decoder in (dense, sparse)
    ]
    differing = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"dense and checkpoint are no two versions of one model: {len(differing)} matrices differ, such as {name}, "
            f"{shapes[0].get(name, 'none')} in dense and {shapes[1].get(name, 'none')} in checkpoint; give the dense "
            "model that the checkpoint was made from."
        )


def _batches(tokens_ST: Tensor, batch_size: int) -> Iterator[tuple[slice, int]]:
    """Batches of samples, and their length; padded samples by themselves, cut to their text."""
    for start in range(0, len(tokens_ST), batch_size):
        is_text_BT = tokens_ST[start : start + batch_size] != PADDING
        if is_text_BT.all():
            yield slice(start, start + len(is_text_BT)), tokens_ST.shape[1]
        else:
            for row, length in enumerate(is_text_BT.sum(1).tolist(), start):
                yield slice(row, row + 1), length


def _embedded(decoder: Decoder, tokens_ST: Tensor, batches: Sequence[tuple[slice, int]]) -> Tensor:
    """What reaches the first layer, (S, T, D) in float32 on the CPU; zeros at padding."""
    parts = [(rows, length, decoder.embed(tokens_ST[rows, :length])[0].cpu()) for rows, length in batches]
    hidden_STD = torch.zeros(*tokens_ST.shape, parts[0][2].shape[-1])
    for rows, length, hidden_BTD in parts:
        hidden_STD[rows, :length] = hidden_BTD
    return hidden_STD


class _Layer:
    """One layer of a model, on the device, with what its matrices are multiplied by."""

    def __init__(self, decoder: Decoder, index: int, compute: Compute) -> None:
        self.decoder, self.index, self.compute = decoder, index, compute
        self.layer: nn.Module = decoder.layers[index]
        self.matrices = layer_matrices(self.layer, f"{decoder.prefix}.{index}")
        self.by_name = {_in_layers(matrix.name, decoder.prefix): matrix for matrix in self.matrices}

    def run(self, hidden_BTD: Tensor, tokens_BT: Tensor) -> dict[str, list[Product]]:
        """Replace hidden states by those behind the layer; its products, by the matrix's name below the layers."""
        products: dict[str, list[Product]] = {}

        def note(product: Product) -> None:
            products.setdefault(_in_layers(product.matrix.name, self.decoder.prefix), []).append(product)

        call = self.decoder.calls(tokens_BT)[self.index]
        inputs_BTD = hidden_BTD.to(self.compute.device)
        with observing_products(self.matrices, note), self.compute.autocast():
            outputs_BTD = call_layer(self.layer, inputs_BTD, call)
        hidden_BTD.copy_(outputs_BTD)
        return products


def _in_layers(name: str, prefix: str) -> str:
    """A name below the list of layers, which may be called otherwise in the other model."""
    return name.removeprefix(f"{prefix}.")


class _Sums:
    """Sums over the tokens of one matrix, in float64 on the device; what is not finite stays so."""

    def __init__(self, device: torch.device) -> None:
        self.rows, self.energy = 0, torch.zeros((), dtype=torch.float64, device=device)
        self.totals = {kind: torch.zeros_like(self.energy) for kind in ("local", "accumulated")}
        self.worst = {kind: torch.zeros_like(self.energy) for kind in self.totals}
        self.is_compared = True  # whether rows of the two models are of the same tokens

    def add_dense(self, outputs_NO: Tensor) -> None:
        """Add outputs of the dense model, the unit of errors."""
        self.rows += len(outputs_NO)
        self.energy += outputs_NO.square().sum(dtype=torch.float64)

    def add(self, kind: str, errors_NO: Tensor) -> None:
        """Add errors of the outputs, of one kind."""
        errors_N = errors_NO.square().sum(1)
        self.totals[kind] += errors_N.sum(dtype=torch.float64)
        self.worst[kind] = torch.maximum(self.worst[kind], errors_N.max().double())

    def drift(self, name: str, layer: int, prefix: str) -> MatrixDrift | None:
        """What they say; None for a parameter that was in no product, or only in products of zero."""
        if not self.energy:
            return None
        local, accumulated = (
            RelativeError((total / self.energy).item(), (worst * self.rows / self.energy).item())
            for total, worst in zip(self.totals.values(), self.worst.values(), strict=True)
        )
        kind = _NUMBER.sub("*", name.removeprefix(f"{prefix}.{layer}.")).removesuffix(".weight")
        return MatrixDrift(name, layer, kind, local, accumulated if self.is_compared else None)


def _compare(
    dense: dict[str, list[Product]],
    sparse: dict[str, list[Product]],
    others: dict[str, Matrix],
    sums: dict[str, _Sums],
    *,
    num_tokens: int,
) -> None:
    """Add the products of a batch to the sums.

    Args:
        dense: Products of the dense layer.
        sparse: Those of the sparse layer, by the same names.
        others: Matrices of the sparse layer.
        sums: By the name of the dense matrix.
        num_tokens: Tokens of the batch.
    """
    for name, products in dense.items():
        total, theirs = sums[products[0].matrix.name], sparse.get(name, [])
        total.is_compared &= _same_tokens(products, theirs, num_tokens)
        for place, product in enumerate(products):
            inputs_NI = product.rows_NI.float()
            if not len(inputs_NI):
                continue
            weight_OI, other_OI = (_weight(product, matrix) for matrix in (product.matrix, others[name]))
            outputs_NO = inputs_NI @ weight_OI.T
            total.add_dense(outputs_NO)
            total.add("local", inputs_NI @ (other_OI - weight_OI).T)
            if total.is_compared:
                total.add("accumulated", theirs[place].rows_NI.float() @ other_OI.T - outputs_NO)


def _same_tokens(dense: Sequence[Product], sparse: Sequence[Product], num_tokens: int) -> bool:
    """Whether the rows of products are those of the same tokens: all of them, as far as numbers tell.

    Experts in modules of their own are given some of the tokens. Those in one parameter, all of them together.
    """
    counts = [[product.inputs.flatten(0, -2).shape[0] for product in products] for products in (dense, sparse)]
    is_plain = all(product.matrix.experts == 1 for product in (*dense, *sparse))
    return is_plain and counts[0] == counts[1] and all(count % num_tokens == 0 for count in counts[0])


def _weight(product: Product, matrix: Matrix) -> Tensor:
    """The weight (O, I) of a matrix for the expert of a product, read as that product reads it."""
    weight = matrix.weight[product.expert] if matrix.weight.dim() == 3 else matrix.weight
    return weight if product.input_dim == 1 else weight.T
