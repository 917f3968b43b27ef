"""Profile of a layer on one real batch: seconds, what its backward keeps, which rows reach its matrices."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from lightning import LightningModule
from torch import Tensor

from lit_recon.activations.chain import Chain
from lit_recon.model.decoder import LayerCall
from lit_recon.model.layerwise import float32_on
from lit_recon.model.products import Product, SharedInputs, observing_products
from lit_recon.model.windows import Window
from lit_recon.modules.trained import attached, changed_by, trained_by
from lit_recon.system.device import Compute

_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """Seconds and memory of one window on one batch.

    Attributes:
        saved_bytes: What autograd keeps for a backward, besides the weights.
        seconds: A forward without it.
        parameters: Of the window.
        trained: Those that are trained, adapters included.
        adapters: Those of these that are not the window's.
        changed: Those of the window that are changed.
        mask_bytes: What the masks take that a fit has of its own.
        weight_bytes: Of one weight in the model.
        keeps_best: Whether the best state of what is trained is kept.
        is_anchored: Whether what is trained is pulled towards its start.
    """

    saved_bytes: int
    seconds: float
    parameters: int
    trained: int
    adapters: int
    changed: int
    mask_bytes: int
    weight_bytes: int
    keeps_best: bool = False
    is_anchored: bool = False

    @property
    def kept(self) -> int:
        """Parameters of which a fit has a copy in float32 to return to, besides the start of the window's own."""
        return self.trained if self.keeps_best else self.adapters

    @property
    def training_bytes(self) -> int:
        """Memory of training besides the weights and what the backward keeps of a batch.

        In float32 a gradient and two moments of what is trained, a copy of the best state, an anchor's start and the
        distance to it, and masks; the pruned weights to go back to; the boolean mask. Autocast's copies in 16 bits are
        among what the backward keeps.
        """
        masks = self.mask_bytes + self.parameters
        copies = self.kept + 2 * self.trained * self.is_anchored
        return (self.trained * 3 + copies) * _FLOAT32 + masks + self.changed * self.weight_bytes


def profile(
    window: Window, chain: Chain, batch_size: int, module: Callable[..., LightningModule] | None
) -> LayerProfile:
    """Run a window on one batch of its chain, and count what autograd keeps for its backward besides the weights.

    Args:
        window: The window.
        chain: Its chain.
        batch_size: Samples of the batch.
        module: Makes the LightningModule that says what is trained; None: all of the window.
    """
    compute, rows_B = chain.passes.compute, _first_batch(chain, batch_size)
    inputs_BTD = chain.inputs_STD[rows_B].to(compute.device).float()
    calls = chain.passes.batching.calls(rows_B)
    kept: dict[int, int] = {}
    with float32_on(window, compute.device):
        _seconds(window, inputs_BTD, calls, compute)  # the first call of a shape pays for set-up
        seconds = min(_seconds(window, inputs_BTD, calls, compute) for _ in range(5))
        made = _made(module, window)
        there = (*window.parameters(), *made.parameters(), *made.buffers())
        weights = {tensor.untyped_storage().data_ptr() for tensor in there}

        def count(tensor: Tensor) -> None:  # nothing is unpacked; a tensor kept here would keep the graph for ever
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()

        with attached(made):
            trained = trained_by(made, window)
            for parameter in trained:
                parameter.requires_grad_(True)
            with torch.autograd.graph.saved_tensors_hooks(count, lambda nothing: nothing), compute.autocast():
                window(inputs_BTD, calls)
            window.requires_grad_(False)
        changed = changed_by(made, window)
    own = window.own_parameters()
    owned = {id(one) for one in own}
    return LayerProfile(
        saved_bytes=sum(kept.values()),
        seconds=seconds,
        parameters=_count(own),
        trained=_count(trained),
        adapters=_count(one for one in trained if id(one) not in owned),
        changed=_count(changed),
        mask_bytes=sum(one.nbytes for one in made.buffers(recurse=False)) if module else _count(own) * _FLOAT32,
        weight_bytes=chain.passes.decoder.model.dtype.itemsize,
    )


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _made(module: Callable[..., LightningModule] | None, window: Window) -> LightningModule:
    """A LightningModule of a window of which nothing is pruned; one that says nothing where there is none."""
    if module is None:
        return LightningModule()
    prunable = [matrix for matrix in window.matrices() if matrix.input_dim is not None]
    return module(window, {one.name: torch.ones_like(one.weight, dtype=torch.bool) for one in prunable}, 1.0)


@torch.no_grad()
def _seconds(window: Window, inputs_BTD: Tensor, calls: list[LayerCall], compute: Compute) -> float:
    start = time.perf_counter()
    with compute.autocast():
        window(inputs_BTD, calls).sum().item()  # reading a value waits for a GPU
    return time.perf_counter() - start


@torch.no_grad()
def rows_per_matrix(layer: Window, chain: Chain, batch_size: int) -> tuple[set[str], Counter[str]]:
    """Which matrices of a layer have an input of their own, and how many rows each is given by all samples.

    Seen on one batch. An expert is given the tokens that are routed to it.
    """
    compute, rows_B = chain.passes.compute, _first_batch(chain, batch_size)
    shared, names, rows = SharedInputs(), set(), Counter[str]()

    def note(product: Product) -> None:
        names.add(shared.leader_of(product))
        rows[product.matrix.name] += product.rows_NI.shape[0]

    inputs_BTD = chain.inputs_STD[rows_B].to(compute.device).float()
    with float32_on(layer, compute.device), compute.autocast(), observing_products(layer.matrices(), note):
        layer(inputs_BTD, chain.passes.batching.calls(rows_B))
    share = len(chain.passes.tokens_ST) / len(rows_B)
    return names, Counter({name: int(count * share) for name, count in rows.items()})


def gram_bytes(layers: Sequence[Window], chain: Chain, batch_size: int) -> tuple[int, int]:
    """Bytes of the Gram matrices of a layer's inputs in float32, and of those that are solved for, in float64."""
    sums, widest = 0, 0
    for layer in {repr(layer): layer for layer in layers}.values():
        found = [matrix for matrix in layer.matrices() if matrix.input_dim is not None]
        widths = {one.name: one.by_expert(one.weight).shape[2] for one in found}
        leaders = rows_per_matrix(layer, chain, batch_size)[0]
        sums = max(sums, sum(one.experts * widths[one.name] ** 2 for one in found if one.name in leaders))
        widest = max(widest, *widths.values())
    return 4 * sums, 4 * 12 * widest**2


def _first_batch(chain: Chain, batch_size: int) -> Tensor:
    return torch.arange(min(batch_size, chain.passes.batching.num_samples))
