"""Arrays of which a GPU is given the next batch ahead: the same values, and none that were changed since."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import fitter, masks_of, module
from torch import Tensor
from walks import SAMPLES, Walk, batches, chain_in, each, title_of

from lit_recon.activations.datamodule import Activations
from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import MemoryStore, PinnedStore
from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import partition
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner, prune

CPU = torch.device("cpu")


class Copies:
    """Stands in for a stream: copies are made at once, and counted."""

    device = CPU

    def __init__(self) -> None:
        self.started, self.taken, self.waits = 0, 0, 0

    def start(self, copy: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.started += 1
        copied = copy()

        def take() -> Tensor:
            self.taken += 1
            return copied

        return take

    def wait(self) -> None:
        self.waits += 1


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def store(dtype: torch.dtype = torch.float32) -> PinnedStore:
    return PinnedStore(dtype, Copies(), zeros)  # type: ignore[arg-type]


@pytest.fixture
def tokens_ST() -> Tensor:
    """Three calibration and two held-out samples: not a multiple of the batch of two."""
    return torch.randint(3, 64, (SAMPLES, 12), generator=torch.Generator().manual_seed(1))


def test_a_batch_that_was_prefetched_is_not_copied_again_and_one_that_was_not_is_there_as_well() -> None:
    made = store(torch.bfloat16)
    array = made.zeros((4, 2, 3))
    array.copy_(torch.arange(24).view(4, 2, 3))
    made.prefetch(array, slice(2, 6))  # up to the end
    made.prefetch(array, [2, 3])
    assert made._copies.started == 1, "the same samples"
    loaded = made.load(array, [2, 3], CPU)
    assert loaded.dtype == torch.float32 and torch.equal(loaded, array[2:].float()) and made._copies.taken == 1
    assert torch.equal(made.load(array, [3, 0], CPU), array[[3, 0]].float()) and made._copies.taken == 1


def test_what_has_changed_since_it_was_prefetched_is_read_again() -> None:
    made = store()
    array = made.zeros((4, 2, 3))
    made.prefetch(array, [1, 2])
    made.settle()  # as every pass does that changes arrays
    array += 1
    assert made._copies.waits == 1 and made.load(array, [1, 2], CPU).eq(1).all()


def test_batches_that_nobody_asks_for_do_not_fill_the_memory() -> None:
    made = store()
    array = made.zeros((40, 1, 1))
    for row in range(40):
        made.prefetch(array, [row])
    assert len(made._ahead) == 4


@torch.no_grad()
@pytest.mark.parametrize(("case", "propagation"), each("blocks", "parallel halves"), ids=title_of)
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_a_walk_is_the_same_as_in_ordinary_memory(
    case: str, propagation: Propagation, recompute: bool, tokens_ST: Tensor
) -> None:
    if recompute and case.startswith("parallel") and propagation.corrects:
        return  # refused
    pinned = store(torch.bfloat16)
    ones = Walk(case, tokens_ST, propagation, store=MemoryStore(torch.bfloat16), recompute=recompute)
    others = Walk(case, tokens_ST, propagation, store=pinned, recompute=recompute)
    for position in range(len(ones.windows)):
        pairs = zip(batches(ones.start(position)), batches(others.start(position)), strict=True)
        assert all(torch.equal(one, other) for pair in pairs for one, other in zip(*pair, strict=True))
        state, other_state = ones.end(position), others.end(position)
        assert all(torch.equal(state[name], other_state[name]) for name in state)
    assert pinned._copies.taken > 0


def test_a_fit_comes_to_the_same_end_as_in_ordinary_memory(tokens_ST: Tensor, tmp_path: Path) -> None:
    ends = []
    for number, one in enumerate((MemoryStore(torch.bfloat16), store(torch.bfloat16))):
        model = tiny_model("llama")
        chain, window = chain_in(model, tokens_ST, store=one), partition(model)[0]
        masks = masks_of(Pruner(Magnitude(), Unstructured(sparsity=0.5), chain), window)
        prune(window, masks)
        result = fitter(tmp_path / str(number), module()).fit(window, masks, Activations.from_chain(chain))
        ends.append((result.held_out_after, [parameter.detach().clone() for parameter in window.parameters()]))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(one, other) for one, other in zip(ends[0][1], ends[1][1], strict=True))
