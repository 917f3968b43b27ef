"""Weights of the next window, read ahead: the same values wherever windows overlap, in the memory of one window."""

from pathlib import Path

import pytest
import torch
from conftest import CPU
from torch import Tensor

from lit_recon.model.architectures import tiny_model
from lit_recon.model.mapped_files import DenseFiles
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import partition
from lit_recon.model.staged_weights import StagedWeights


class Memory:
    """Memory that is ordinary, and counted."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.waits = 0

    def zeros(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        self.sizes.append(shape[0])
        return torch.zeros(*shape, dtype=dtype)

    def wait(self) -> None:
        self.waits += 1


def test_what_was_read_is_a_copy_and_what_was_not_is_the_weight_itself() -> None:
    memory = Memory()
    staged = StagedWeights(memory.zeros, memory.wait)
    ones, twos, others = torch.ones(3, 5).bfloat16(), torch.full((7,), 2.0), torch.zeros(2)
    staged.read([ones, twos])
    for weight in (ones, twos):
        copy = staged.of(weight)
        assert torch.equal(copy, weight) and copy.dtype == weight.dtype and copy.data_ptr() != weight.data_ptr()
        assert copy.data_ptr() % 4 == 0
    assert staged.of(others) is others
    staged.read([others])
    assert staged.of(ones) is ones and torch.equal(staged.of(others), others)
    assert memory.sizes == [128] and memory.waits == 2, "one piece, not changed before a GPU has taken what is in it"


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ("llama", {"by": "block"}),
        ("llama", {"by": "half"}),
        ("llama", {"by": "blocks", "size": 2, "stride": 1}),
        ("phi", {"by": "half"}),  # whose second half has the first one's norm, trained there
    ],
    ids=str,
)
@torch.no_grad()
def test_a_walk_puts_the_same_weights_on_the_device_as_without_reading_ahead(shape: str, cut: dict) -> None:
    memory, ends = Memory(), []
    for ahead in (False, True):
        model = tiny_model(shape).bfloat16()
        made, seen = WeightOffloader(model, CPU.device), []
        made.staged = StagedWeights(memory.zeros, memory.wait) if ahead else None
        windows = partition(model, **cut)
        for window, following in zip(windows, [*windows[1:], None], strict=True):
            made.onload(window, prefetch=following.indices if following else ())
            seen.extend(parameter.clone() for parameter in window.parameters())
            for parameter in window.own_parameters():
                parameter.mul_(1.5)
            made.offload(window)
        ends.append([*seen, *(parameter.clone() for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    layer = sum(-(-2 * one.numel() // 64) * 64 for one in tiny_model(shape).model.layers[0].parameters())
    assert memory.sizes == sorted(set(memory.sizes)) and memory.sizes[-1] <= layer * cut.get("size", 1)


def test_weights_that_are_mapped_from_files_are_read_too(tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16()
    model.save_pretrained(tmp_path)
    files = DenseFiles([tmp_path / "model.safetensors"])
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    made = WeightOffloader(model, CPU.device, files=files)
    memory = Memory()
    made.staged = StagedWeights(memory.zeros, memory.wait)
    first, second, _ = partition(model)
    made.onload(first, prefetch=second.indices)
    made.offload(first)
    mapped = second.layers[0].mlp.up_proj.weight.data
    assert made.staged.of(mapped) is not mapped
    made.onload(second)
    assert torch.equal(second.layers[0].mlp.up_proj.weight, dense["model.layers.1.mlp.up_proj.weight"].float())
