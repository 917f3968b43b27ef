"""What one real batch of one layer tells of all: seconds, what its backward keeps, which rows reach its matrices."""

import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_recon.activations.chain import Chain
from lit_recon.activations.matrix_inputs import Leaders
from lit_recon.model.decoder import LayerCall, float32_on
from lit_recon.model.matrices import Product, observed
from lit_recon.model.windows import Window


@dataclass(frozen=True)
class Probe:
    """What one batch of one window showed.

    Attributes:
        saved_bytes: What autograd keeps for a backward, beside the weights.
        seconds: A forward without it.
        parameters: Of the window, those that are trained.
        weight_bytes: Of one weight in the model.
    """

    saved_bytes: int
    seconds: float
    parameters: int
    weight_bytes: int


def probe(window: Window, chain: Chain) -> Probe:
    """Run a window on one batch, with what autograd keeps for its backward beside the weights."""
    rows_B = torch.arange(min(chain.batch_size, chain.num_samples))
    inputs_BTD = chain.inputs_STD[rows_B].to(chain.compute.device).float()
    calls = chain.calls(rows_B)
    kept: dict[int, int] = {}
    with float32_on(window, chain.compute.device):
        _seconds(window, inputs_BTD, calls, chain)  # the first call of a shape pays for set-up
        seconds = min(_seconds(window, inputs_BTD, calls, chain) for _ in range(5))
        weights = {parameter.untyped_storage().data_ptr() for parameter in window.parameters()}

        def count(tensor: Tensor) -> None:  # nothing is unpacked; a tensor kept here would keep the graph for ever
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()

        for parameter in window.trained():
            parameter.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda nothing: nothing), chain.compute.autocast():
            window(inputs_BTD, calls)
        window.requires_grad_(False)
    parameters = sum(parameter.numel() for parameter in window.trained())
    return Probe(sum(kept.values()), seconds, parameters, chain.decoder.model.dtype.itemsize)


@torch.no_grad()
def _seconds(window: Window, inputs_BTD: Tensor, calls: list[LayerCall], chain: Chain) -> float:
    start = time.perf_counter()
    with chain.compute.autocast():
        window(inputs_BTD, calls).sum().item()  # reading a value waits for a GPU
    return time.perf_counter() - start


@torch.no_grad()
def observe(layer: Window, chain: Chain) -> tuple[set[str], Counter[str]]:
    """Which matrices of a layer have an input of their own, and how many rows each is given by all samples.

    Seen on one batch. An expert is given the tokens that are routed to it.
    """
    rows_B = torch.arange(min(chain.batch_size, chain.num_samples))
    leaders, names, rows = Leaders(), set(), Counter[str]()

    def note(product: Product) -> None:
        names.add(leaders.of(product))
        rows[product.matrix.name] += product.rows_NI.shape[0]

    inputs_BTD = chain.inputs_STD[rows_B].to(chain.compute.device).float()
    with float32_on(layer, chain.compute.device), chain.compute.autocast(), observed(layer.matrices(), note):
        layer(inputs_BTD, chain.calls(rows_B))
    share = len(chain.tokens_ST) / len(rows_B)
    return names, Counter({name: int(count * share) for name, count in rows.items()})
