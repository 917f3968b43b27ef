"""Where activations are kept changes neither what windows are trained on nor what is left behind."""

import copy
import errno
import gc
import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import CPU, Ended, chain_of, fitter, letter_tokenizer, masks_of, module, pairs
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_recon.activations import disk_store as disk
from lit_recon.activations.chain import Chain
from lit_recon.activations.datamodule import Activations
from lit_recon.activations.disk_store import DiskStore
from lit_recon.activations.matrix_inputs import MatrixInputs
from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import MemoryStore, StoreSettings, check_targets, count_arrays
from lit_recon.activations.teacher import check_halves
from lit_recon.data.packing import PADDING
from lit_recon.fit.configure import CONF
from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import layer_windows, partition
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner, prune
from lit_recon.reconstruction.window_fit import WindowResult

CALIBRATION, SAMPLES, LENGTH = 3, 5, 12
VALID = [
    Propagation(inputs=inputs, targets=targets, statistics=statistics, mix=0.3)
    for inputs, targets, statistics in itertools.product(
        ("dense", "sparse", "mix"), ("dense", "local"), ("dense", "sparse")
    )
    if (inputs, targets) != ("dense", "local")
]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "blocks": ("llama", {"by": "block"}),
    "overlapping blocks": ("llama", {"by": "blocks", "size": 2, "stride": 1}),
    "sequential halves": ("llama", {"by": "half"}),
    "parallel halves": ("gpt_neox", {"by": "half"}),
    "parallel halves with a shared norm": ("phi", {"by": "half"}),
}
EXACTING = ("overlapping blocks", "parallel halves with a shared norm")  # the other cases do less


@pytest.fixture
def tokens_ST() -> Tensor:
    """Three calibration and two held-out samples: not a multiple of the batch of two."""
    return torch.randint(3, 64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


def name_of(propagation: Propagation) -> str:
    return f"{propagation.inputs} {propagation.targets} {propagation.statistics}"


def title(value: str | Propagation) -> str:
    return value if isinstance(value, str) else name_of(value)


def each(*cases: str) -> list:
    """These cases with each propagation; by default the exacting ones, and all with the fewest chains and with two."""
    return pairs(cases, VALID, EXACTING, (VALID[0], VALID[3]))


def chain_in(
    model: PreTrainedModel, tokens_ST: Tensor, propagation: Propagation | None = None, **settings: Any
) -> Chain:
    """A chain at the model's first layer, whose store and way of making targets are `settings`."""
    return chain_of(model, tokens_ST, CALIBRATION, propagation=propagation, **settings)


@torch.no_grad()
def change(parameters: Sequence[nn.Parameter], seed: int) -> None:
    """Stand in for pruning and reconstruction."""
    for index, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * seed + index)
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


class Walk:
    """A walk over a model of its own, one window at a time."""

    def __init__(self, case: str, tokens_ST: Tensor, propagation: Propagation, **settings: Any) -> None:
        shape, cut = CASES[case]
        self.model = tiny_model(shape)
        self.windows = layer_windows(self.model, **cut)
        self.chain = chain_in(self.model, tokens_ST, propagation, **settings)

    def start(self, position: int) -> Activations:
        """The activations of a window, which is changed by now."""
        window = self.windows[position]
        self.chain.dense_pass(window)
        self.passed_on = [parameter.clone() for parameter in window.shared_with_next()]
        change(window.trained(), seed=position)
        return Activations.from_chain(self.chain)

    @torch.no_grad()
    def end(self, position: int) -> dict[str, Tensor]:
        """The state behind a window; layers that are not kept are what they were."""
        window = self.windows[position]
        for parameter, value in zip(window.shared_with_next(), self.passed_on, strict=True):
            parameter.copy_(value)
        self.chain.advance(window)
        return self.chain.state()


def batches(data: Activations) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets as the chain batches its samples."""
    parts = [*data.batches(0, CALIBRATION), *data.batches(CALIBRATION, SAMPLES)]
    return [(batch.inputs_BTD, batch.targets_BTD) for batch in parts]


def off(values: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative."""
    values, expected = values.double(), expected.double()
    return ((values - expected).square().mean() / expected.square().mean()).sqrt().item()


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "ram"}, "store.kind='ram': expected one of memory, disk, auto"),
        ({"targets": "drop"}, "store.targets='drop': expected one of keep, recompute"),
        ({"dtype": "int8"}, "store.dtype='int8': expected one of None, bfloat16, float32"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_with_what_is_expected(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StoreSettings(**settings)


def test_all_bad_settings_are_told_at_once() -> None:
    with pytest.raises(ValueError) as refusal:
        StoreSettings(kind="x", targets="y", dtype="z")
    named = [line.partition("=")[0] for line in str(refusal.value).splitlines()]
    assert named == ["store.kind", "store.targets", "store.dtype"]


@pytest.mark.parametrize("kind", ["memory", "disk", "auto"])
def test_each_member_of_the_group_keeps_what_its_name_says(kind: str) -> None:
    settings = instantiate(OmegaConf.load(CONF / "store" / f"{kind}.yaml"), _convert_="all")
    assert (settings.kind, settings.targets, settings.recompute) == (kind, "keep", False)


def test_single_matrices_are_refused_with_recomputed_targets() -> None:
    check_targets("matrix", "keep")
    check_targets("half", "recompute")
    with pytest.raises(ValueError, match="store.targets=recompute with windows=matrix: .*use store.targets=keep"):
        check_targets("matrix", "recompute")


ARRAYS = {  # inputs, targets, statistics: kept, recomputed; counted by hand
    "dense dense dense": (2, 1),  # states, targets | states
    "dense dense sparse": (3, 2),
    "sparse dense dense": (3, 2),
    "sparse dense sparse": (3, 2),
    "sparse local dense": (4, 2),  # two chains, the dense one's next value, targets | two chains
    "sparse local sparse": (2, 1),
    "mix dense dense": (4, 3),  # two chains, the dense one's next value, mixed inputs | all but the next value
    "mix dense sparse": (4, 3),
    "mix local dense": (5, 3),
    "mix local sparse": (5, 3),
}


@pytest.mark.parametrize("propagation", VALID, ids=name_of)
def test_arrays_are_as_many_as_counted_by_hand(propagation: Propagation) -> None:
    assert (count_arrays(propagation, "keep"), count_arrays(propagation, "recompute")) == ARRAYS[name_of(propagation)]


def test_bytes_are_those_of_the_arrays() -> None:
    shape = (128, 2048, 4096)  # 2**30 numbers
    assert StoreSettings(kind="memory").needed(shape, 2) == (2 * 2**32, 0)
    assert StoreSettings(kind="memory", dtype="bfloat16").needed(shape, 2) == (2 * 2**31, 0)
    assert StoreSettings(kind="disk").needed(shape, 3) == (0, 3 * 2**31)
    assert StoreSettings(kind="disk", dtype="float32").needed(shape, 3) == (0, 3 * 2**32)


@pytest.mark.parametrize(("available", "kind"), [(8000, "memory"), (7999, "disk")])
def test_auto_takes_memory_up_to_its_share_of_what_is_free(
    available: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    settings = StoreSettings(kind="auto")
    with caplog.at_level("INFO"), settings.open(tmp_path / "states", (5, 10, 10), 2) as store:  # 4000 bytes
        assert isinstance(store, {"memory": MemoryStore, "disk": DiskStore}[kind])
        assert store.dtype == {"memory": torch.float32, "disk": torch.bfloat16}[kind]
    (line,) = caplog.messages
    assert ("in memory" if kind == "memory" else str(tmp_path)) in line


def test_too_little_free_space_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=3 * 10**9))
    folder, shape = tmp_path / "not" / "there", (1000, 1000, 1000)  # 2 GB per array
    settings = StoreSettings(kind="disk")
    settings.check(folder, shape, 1)
    StoreSettings(kind="memory").check(folder, shape, 100)
    with pytest.raises(ValueError, match=r"need 4\.00 GB in .*, where 3\.00 GB are free.*store\.targets=recompute"):
        settings.check(folder, shape, 2)
    assert set(asked) == {tmp_path} and not folder.exists()


# Files


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


# Chains


@torch.no_grad()
@pytest.mark.parametrize(("case", "propagation"), each(*CASES), ids=title)
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


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many files a store in `tmp_path` has after each new array."""
    counts: list[int] = []
    zeros = DiskStore.zeros

    def counted(store: DiskStore, shape: Sequence[int]) -> Tensor:
        array = zeros(store, shape)
        counts.append(len(list(tmp_path.iterdir())))
        return array

    monkeypatch.setattr(DiskStore, "zeros", counted)
    return counts


@torch.no_grad()
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize(
    ("case", "propagation"), each("blocks", "overlapping blocks", "sequential halves", "parallel halves"), ids=title
)
def test_there_are_at_most_as_many_files_as_were_counted(
    case: str, propagation: Propagation, recompute: bool, tmp_path: Path, tokens_ST: Tensor, files: list[int]
) -> None:
    if recompute and case.startswith("parallel") and propagation.corrects:
        return  # refused
    walk = Walk(case, tokens_ST, propagation, store=DiskStore(tmp_path), recompute=recompute)
    for position in range(len(walk.windows)):
        walk.start(position)
        walk.end(position)
    settings = CASES[case][1]
    parallel = case.startswith("parallel")
    kind = "half" if parallel else "block"
    targets = "recompute" if recompute else "keep"
    assert max(files) == count_arrays(
        propagation, targets, kind=kind, parallel=parallel, overlapping="stride" in settings
    )


@torch.no_grad()
@pytest.mark.parametrize(("kind", "units"), [("block", "half"), ("model", "half"), ("model", "block")])
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_files_of_units_that_are_pruned_within_a_window_are_counted_too(
    kind: str, units: str, recompute: bool, tmp_path: Path, tokens_ST: Tensor, files: list[int]
) -> None:
    propagation, model = Propagation(statistics="sparse"), tiny_model("gpt_neox")  # whose halves stand side by side
    chain = chain_in(model, tokens_ST, propagation, store=DiskStore(tmp_path), recompute=recompute)
    pruner = Pruner(Wanda(), Unstructured(sparsity=0.5), chain, pruning_windows=layer_windows(model, by=units))
    for window in layer_windows(model, by=kind):
        prune(window, masks_of(pruner, window))
        chain.advance(window)
    assert max(files) == count_arrays(propagation, "recompute" if recompute else "keep", kind=kind, prune_by=units)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("propagation", [VALID[0], VALID[4], VALID[6]], ids=name_of)
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
    walk = Walk("parallel halves", tokens_ST, VALID[2], store=DiskStore(tmp_path, torch.float32))
    for position in range(2):
        data = walk.start(position)
        data.unit()
        assert sum(len(rows_B) for rows_B, *_ in data.data_module(seed=0).train_dataloader()) == CALIBRATION
        size = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert resident(tmp_path) < size / 4, "the system maps some pages around those that are asked for"
        walk.end(position)
        assert resident(tmp_path) < size / 4


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "propagation"), [("llama", VALID[0]), ("llama", VALID[2]), ("mixtral", VALID[0]), ("mixtral", VALID[4])]
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


class Watched(MemoryStore):
    """A store that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, list[int]]] = []

    def _tell(self, what: str, rows: slice | Sequence[int]) -> None:
        chosen = list(range(SAMPLES))[rows] if isinstance(rows, slice) else list(rows)
        if chosen:
            self.told.append((what, chosen))

    def prefetch(self, array_STD: Tensor, rows: slice | Sequence[int]) -> None:
        self._tell("prefetch", rows)

    def release(self, array_STD: Tensor, rows: slice | Sequence[int]) -> None:
        self._tell("release", rows)


def test_the_next_batch_of_a_pass_is_prefetched_before_one_is_run(tokens_ST: Tensor) -> None:
    store = Watched()
    model = tiny_model("llama")
    chain = chain_in(model, tokens_ST, store=store)
    window = layer_windows(model)[0]
    store.told.clear()
    window.register_forward_pre_hook(lambda _, args: store.told.append(("run", [len(args[0])])))
    chain.passes.run(window, chain.inputs_STD, None)
    assert [entry for entry in store.told if entry[0] != "release"] == [
        ("prefetch", [2, 3]),
        ("run", [2]),
        ("prefetch", [3, 4]),
        ("run", [1]),
        ("run", [2]),
    ]


def test_a_training_batch_is_prefetched_while_the_one_before_it_is_served(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    store = Watched()
    chain = chain_in(model, tokens_ST, store=store)
    chain.dense_pass(layer_windows(model)[0])
    chain.passes.batching.num_samples = SAMPLES
    loader = Activations.from_chain(chain).data_module(seed=3).train_dataloader()
    for _ in range(2):  # epochs
        store.told.clear()
        served = [rows_B.tolist() for rows_B, *_ in loader]
        assert sorted(itertools.chain(*served)) == list(range(SAMPLES))
        first, second, third = served
        told = [rows for what, rows in store.told if what == "prefetch"][::2]  # inputs, targets
        assert told == served
        order = [entry for entry in store.told if entry in (("prefetch", third), ("release", second))]
        assert order[0] == ("prefetch", third)


# Resume


def resumed(walk: Walk, tokens_ST: Tensor, propagation: Propagation, **settings: Any) -> Walk:
    """Another walk at the same window, as after an interruption."""
    arrays = {name: array.clone() for name, array in walk.chain.state().items()}
    other = copy.copy(walk)
    other.model, other.windows = copy.deepcopy((walk.model, walk.windows))
    other.chain = chain_in(other.model, tokens_ST, propagation, **settings)
    other.chain.restore(arrays)
    return other


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("case", "propagation"), each("blocks", "overlapping blocks", "parallel halves"), ids=title)
def test_a_restored_chain_goes_on_bit_for_bit(
    case: str, propagation: Propagation, padded: bool, tokens_ST: Tensor, tmp_path: Path
) -> None:
    if padded:
        tokens_ST = tokens_ST.where(torch.arange(LENGTH) < torch.tensor([12, 5, 9, 12, 7])[:, None], PADDING)
    stores = {"store": DiskStore(tmp_path / "one")}, {"store": DiskStore(tmp_path / "other")}
    walk = Walk(case, tokens_ST, propagation, **stores[0])
    stop = 1 if "blocks" in case else 3  # between halves
    for position in range(stop):
        walk.start(position)
        walk.end(position)
    other = resumed(walk, tokens_ST, propagation, **stores[1])
    for position in range(stop, len(walk.windows)):
        expected, found = walk.start(position), other.start(position)
        assert torch.equal(found.inputs_STD, expected.inputs_STD)
        assert torch.equal(found.targets_STD, expected.targets_STD)
        assert found.unit() == expected.unit()
        behind, expected_behind = other.end(position), walk.end(position)
        assert set(behind) == set(expected_behind)
        assert all(torch.equal(behind[name], expected_behind[name]) for name in behind)


def test_the_state_is_named_and_not_copied(tokens_ST: Tensor) -> None:
    walk = Walk("parallel halves", tokens_ST, VALID[1])
    names = []
    for position in range(2):
        walk.start(position)
        state = walk.end(position)
        names.append(sorted(state))
        assert state["dense"] is walk.chain.dense.states_STD and state["sparse"] is walk.chain.sparse.states_STD
    assert names == [["dense", "dense_aside", "sparse", "sparse_aside"], ["dense", "sparse"]]


def test_another_chains_state_is_refused_with_both(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    state = chain_in(model, tokens_ST, Propagation()).state()
    with pytest.raises(
        ValueError, match=r"the dense chain, .* they are the dense and sparse chain, 5 x 12 x 32 float32"
    ):
        chain_in(model, tokens_ST, VALID[1]).restore(state)
    with pytest.raises(ValueError, match=r"5 x 12 x 32 float32, .* 5 x 12 x 32 bfloat16; resume with .*store\.dtype"):
        chain_in(model, tokens_ST, store=MemoryStore(torch.bfloat16)).restore(state)
    with pytest.raises(ValueError, match="5 x 12 x 32 .* 4 x 12 x 32"):
        chain_in(model, tokens_ST[:4]).restore(state)


# Recomputed targets


@torch.no_grad()
@pytest.mark.parametrize(("case", "propagation"), each(*CASES), ids=title)
def test_recomputed_targets_are_the_kept_ones(case: str, propagation: Propagation, tokens_ST: Tensor) -> None:
    kept, made = Walk(case, tokens_ST, propagation), Walk(case, tokens_ST, propagation, recompute=True)
    if case.startswith("parallel") and propagation.corrects:
        with pytest.raises(ValueError, match=r"store\.targets=recompute with windows=half and chain\.inputs=.*keep"):
            check_halves(made.windows, propagation, recompute=True)
        return
    check_halves(made.windows, propagation, recompute=True)
    for position, window in enumerate(made.windows):
        expected, found = kept.start(position), made.start(position)
        trained = [parameter.clone() for parameter in window.parameters()]
        for pair, expected_pair in zip(batches(found), batches(expected), strict=True):
            assert torch.equal(pair[0], expected_pair[0]) and torch.equal(pair[1], expected_pair[1])
        for rows in ([2, 0], [1]):
            batch = found.batch(torch.tensor(rows), CPU.device)
            assert off(batch.targets_BTD, expected.targets_STD[rows]) < 1e-6
        assert found.unit() == pytest.approx(expected.unit(), rel=1e-9)
        errors, expected_errors = (
            one.errors(walk.windows[position], 1.0) for one, walk in ((found, made), (expected, kept))
        )
        for one, other in zip(errors, expected_errors, strict=True):
            assert one == pytest.approx(other, rel=1e-6) and min(one) > 1e-6
        assert all(torch.equal(*pair) for pair in zip(trained, window.parameters(), strict=True))
        behind, expected_behind = made.end(position), kept.end(position)
        assert all(torch.equal(behind[name], expected_behind[name]) for name in expected_behind)
        assert made.chain.teacher is None
    assert set(behind) == set(expected_behind)


@torch.no_grad()
@pytest.mark.parametrize("propagation", VALID, ids=name_of)
def test_recomputed_targets_of_padded_samples_are_the_kept_ones_where_there_is_text(
    propagation: Propagation, tokens_ST: Tensor
) -> None:
    lengths = [12, 5, 9, 12, 7]
    tokens_ST = tokens_ST.where(torch.arange(LENGTH) < torch.tensor(lengths)[:, None], PADDING)
    kept, made = Walk("blocks", tokens_ST, propagation), Walk("blocks", tokens_ST, propagation, recompute=True)
    for position in range(len(kept.windows)):
        expected, found = kept.start(position), made.start(position)
        batch = found.batch(torch.tensor([1, 2]), CPU.device)
        rows_ND = torch.cat([expected.targets_STD[1, :5], expected.targets_STD[2, :9]])
        assert off(batch.text(batch.targets_BTD), rows_ND) < 1e-6
        assert found.unit() == pytest.approx(expected.unit(), rel=1e-6)
        kept.end(position)
        made.end(position)


def fitted(tokens_ST: Tensor, run: Path, **settings: Any) -> tuple[WindowResult, list[Tensor]]:
    """The second layer of a tiny Llama, pruned and reconstructed, with its weights."""
    model = tiny_model("llama")
    chain = chain_in(model, tokens_ST, VALID[4], **settings)
    first, second, *_ = partition(model)
    chain.dense_pass(first)
    change(first.trained(), seed=0)
    chain.advance(first)
    masks = masks_of(Pruner(Magnitude(), Unstructured(sparsity=0.5), chain), second)
    prune(second, masks)
    result = fitter(run, module()).fit(second, masks, Activations.from_chain(chain))
    return result, [parameter.detach().clone() for parameter in second.parameters()]


@pytest.mark.parametrize("how", ["recompute", "disk"])
def test_a_fit_comes_to_the_same_end_wherever_its_activations_are(how: str, tokens_ST: Tensor, tmp_path: Path) -> None:
    expected, weights = fitted(tokens_ST, tmp_path / "kept")
    store = DiskStore(tmp_path / "states", torch.float32) if how == "disk" else None
    result, found = fitted(tokens_ST, tmp_path / "other", store=store, recompute=how == "recompute")
    assert expected.accepted and result.accepted
    for name in ("relative_error_before", "held_out_before", "relative_error_after", "held_out_after"):
        assert getattr(result, name) == pytest.approx(getattr(expected, name), rel=1e-4)
    assert max(off(one, other) for one, other in zip(found, weights, strict=True)) < (1e-12 if how == "disk" else 1e-4)


def test_the_dense_weights_are_freed_behind_the_window(tokens_ST: Tensor) -> None:
    walk = Walk("blocks", tokens_ST, Propagation(), recompute=True)
    counts = []
    for position in range(3):
        walk.start(position)
        walk.end(position)
        gc.collect()
        counts.append(sum(type(one) is Tensor for one in gc.get_objects()))
    assert counts[0] == counts[1] == counts[2]


def test_experts_that_see_no_token_of_a_batch_are_no_obstacle_on_disk(
    tiny_run: Callable[..., Ended], tmp_path: Path
) -> None:
    """Llama 4 gives every expert rows for all tokens, zeros where they are another's."""
    tiny_model("llama4", num_hidden_layers=2).save_pretrained(tmp_path / "llama4")
    letter_tokenizer().save_pretrained(tmp_path / "llama4")
    settings = ("windows=matrix", "data.batch_size=1", "data.length=4", "+trainer.limit_train_batches=1")
    ended = tiny_run(f"model.name={tmp_path / 'llama4'}", "store=disk", *settings)
    assert ended.status == 0, ended
