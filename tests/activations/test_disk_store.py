"""Arrays in files: rounded once, gone with their last view, and never more in memory than is worked on."""

import errno
import gc
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, Ended, letter_tokenizer
from torch import Tensor
from walks import (
    CALIBRATION,
    CASES,
    LENGTH,
    PROPAGATIONS,
    SAMPLES,
    Walk,
    batches,
    chain_in,
    each,
    name_of,
    off,
    title_of,
)

from lit_recon.activations.disk_store import DiskStore
from lit_recon.activations.matrix_inputs import MatrixInputs
from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import MemoryStore
from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import partition


@pytest.fixture
def tokens_ST() -> Tensor:
    """Three calibration and two held-out samples: not a multiple of the batch of two."""
    return torch.randint(3, 64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


def test_an_array_on_disk_is_in_its_file_as_bfloat16(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "states")
    array_STD = store.zeros((3, 4, 5))
    assert not array_STD.any() and array_STD.dtype == torch.bfloat16
    values = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    array_STD.copy_(values)
    (file,) = (tmp_path / "states").iterdir()
    halves = np.fromfile(file, "<u2").astype("<u4") << 16  # a bfloat16 is the upper half of a float32
    written = halves.view("<f4").reshape(3, 4, 5)
    np.testing.assert_allclose(written, values.numpy(), rtol=2**-8)
    assert np.array_equal(written, array_STD.float().numpy())


def test_a_file_has_all_its_blocks_before_anything_is_written(tmp_path: Path) -> None:
    array_STD = DiskStore(tmp_path).zeros((4, 64, 1024))
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == array_STD.nbytes == 2**19
    assert file.stat().st_blocks * 512 >= 2**19


def test_a_system_without_fallocate_gets_its_blocks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    array_STD = DiskStore(tmp_path).zeros((3, 1000, 1001))
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == array_STD.nbytes == 2 * 3 * 1000 * 1001
    assert not array_STD.any()


def test_a_file_goes_with_the_last_view_of_its_array(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    first_STD, second_STD = store.zeros((2, 3, 4)), store.zeros((2, 3, 4))
    view_TD = first_STD.fill_(7)[1]
    del first_STD
    assert len(list(tmp_path.iterdir())) == 2 and (view_TD == 7).all()
    del view_TD
    assert len(list(tmp_path.iterdir())) == 1
    del second_STD
    assert not list(tmp_path.iterdir())


def test_a_closed_store_leaves_no_files_and_its_arrays_readable(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "states") as store:
        array_STD = store.zeros((2, 3, 4)).fill_(3)
    assert not (tmp_path / "states").exists()
    assert (array_STD == 3).all()
    del array_STD  # finds its file gone


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "7.states").write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    with DiskStore(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_told_when_an_array_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = DiskStore(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="the disk is full: .* needs 0.08 GB more .*Free some space") as refusal:
        store.zeros((10, 1000, 4000))
    assert refusal.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def resident(folder: Path) -> int:
    """Bytes of the files of a folder that are in this process's memory."""
    maps = Path("/proc/self/smaps").read_text()
    return 1024 * sum(int(size) for size in re.findall(rf"{re.escape(str(folder))}/.*\n(?:.*\n)*?Rss: +(\d+) kB", maps))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's list of mappings")
def test_released_samples_leave_memory_and_keep_their_values(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    array_STD = store.zeros((8, 64, 1024))  # 128 KiB a sample
    array_STD.copy_(torch.arange(8.0)[:, None, None])
    assert resident(tmp_path) == 2**20
    store.release(array_STD, slice(2, 6))
    assert resident(tmp_path) == 2**19
    store.release(array_STD[6:], [1])  # of a part: sample 7
    assert resident(tmp_path) == 2**19 - 2**17
    store.prefetch(array_STD, [7, 0])
    store.release(torch.zeros(8, 2), slice(None))  # not one of its arrays: nothing to do
    assert (array_STD.float().mean((1, 2)) == torch.arange(8.0)).all()


@torch.no_grad()
@pytest.mark.parametrize(("case", "propagation"), each(*CASES), ids=title_of)
def test_a_chain_in_float32_files_is_the_one_in_memory(
    case: str, propagation: Propagation, tmp_path: Path, tokens_ST: Tensor
) -> None:
    memory = Walk(case, tokens_ST, propagation)
    files = Walk(case, tokens_ST, propagation, store=DiskStore(tmp_path, torch.float32))
    for position in range(len(memory.windows)):
        expected, found = memory.start(position), files.start(position)
        assert torch.equal(found.inputs_STD, expected.inputs_STD)
        assert torch.equal(found.targets_STD, expected.targets_STD)
        assert found.unit() == expected.unit()
        behind, expected_behind = files.end(position), memory.end(position)
        assert set(behind) == set(expected_behind)
        assert all(torch.equal(behind[name], expected_behind[name]) for name in behind)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("propagation", [PROPAGATIONS[0], PROPAGATIONS[4], PROPAGATIONS[6]], ids=name_of)
def test_bfloat16_files_cost_no_more_than_their_rounding(
    case: str, propagation: Propagation, tmp_path: Path, tokens_ST: Tensor
) -> None:
    memory, files = Walk(case, tokens_ST, propagation), Walk(case, tokens_ST, propagation, store=DiskStore(tmp_path))
    worst = 0.0
    for position in range(len(memory.windows)):
        expected, found = memory.start(position), files.start(position)
        for (inputs_BTD, targets_BTD), batch in zip(batches(expected), batches(found), strict=True):
            assert batch[0].dtype == batch[1].dtype == torch.float32
            worst = max(worst, off(batch[0], inputs_BTD), off(batch[1], targets_BTD))
        assert found.unit() == pytest.approx(expected.unit(), rel=0.01)
        memory.end(position)
        files.end(position)
    # A rounding to bfloat16 is off by 2**-9 at most, 0.0011 rms; those of up to eight windows follow each other.
    assert 0.0005 < worst < 0.01


@torch.no_grad()
def test_a_pass_leaves_no_samples_in_memory(tmp_path: Path) -> None:
    tokens_ST = torch.randint(3, 64, (SAMPLES, 2048), generator=torch.Generator().manual_seed(1))
    walk = Walk("parallel halves", tokens_ST, PROPAGATIONS[2], store=DiskStore(tmp_path, torch.float32))
    for position in range(2):
        data = walk.start(position)
        data.unit()
        loader = data.data_module(seed=0).train_dataloader()
        assert sum(len(data.batch(rows_B, CPU.device).inputs_BTD) for rows_B in loader) == CALIBRATION
        size = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert resident(tmp_path) < size / 4, "the system maps some pages around those that are asked for"
        walk.end(position)
        assert resident(tmp_path) < size / 4


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "propagation"),
    [
        ("llama", PROPAGATIONS[0]),
        ("llama", PROPAGATIONS[2]),
        ("mixtral", PROPAGATIONS[0]),
        ("mixtral", PROPAGATIONS[4]),
    ],
)
def test_what_single_matrices_are_trained_on_is_in_files_too(
    shape: str, propagation: Propagation, tmp_path: Path, tokens_ST: Tensor
) -> None:
    model = tiny_model(shape)
    windows = partition(model, by="matrix")
    stores = MemoryStore(), DiskStore(tmp_path, torch.float32), DiskStore(tmp_path / "rounded")
    made = []
    for store in stores:
        chain = chain_in(model, tokens_ST, propagation, store=store)
        chain.dense_pass(windows[0].enclosing)
        data = MatrixInputs(windows[0].enclosing, chain)
        before = len(list(tmp_path.glob("*.states")))
        made.append([data.activations(window) for window in windows[:7] if window.enclosing is windows[0].enclosing])
        if store is stores[1]:
            assert len(list(tmp_path.glob("*.states"))) > before
    for memory, files, rounded in zip(*made, strict=True):
        assert torch.equal(files.inputs_STD, memory.inputs_STD) and torch.equal(files.targets_STD, memory.targets_STD)
        assert rounded.inputs_STD.dtype == rounded.targets_STD.dtype == torch.bfloat16
        assert off(rounded.inputs_STD, memory.inputs_STD) < 0.006
        assert off(rounded.targets_STD, memory.targets_STD) < 0.006
    del made, data, chain, memory, files, rounded
    gc.collect()
    assert not list(tmp_path.glob("**/*.states"))


def test_experts_that_see_no_token_of_a_batch_are_no_obstacle_on_disk(
    tiny_run: Callable[..., Ended], tmp_path: Path
) -> None:
    """Llama 4 gives every expert rows for all tokens, zeros where they are another's."""
    tiny_model("llama4", num_hidden_layers=2).save_pretrained(tmp_path / "llama4")
    letter_tokenizer().save_pretrained(tmp_path / "llama4")
    settings = ("windows=matrix", "data.batch_size=1", "data.length=4", "+trainer.limit_train_batches=1")
    ended = tiny_run(f"model.name={tmp_path / 'llama4'}", "store=disk", "chain.inputs=dense", *settings)
    assert ended.status == 0, ended
