"""Where activations are kept changes neither what windows are trained on nor what is left behind."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import fitter, masks_of, module
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from walks import (
    CASES,
    LENGTH,
    PROPAGATIONS,
    SAMPLES,
    Walk,
    WatchedStore,
    chain_in,
    change,
    each,
    name_of,
    off,
    title_of,
)

from lit_recon.activations import disk_store as disk
from lit_recon.activations.datamodule import Activations
from lit_recon.activations.disk_store import DiskStore
from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import MemoryStore, Room, StoreSettings, check_targets, count_arrays, kind_of
from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import layer_windows, partition
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner, prune
from lit_recon.reconstruction.window_result import WindowResult
from lit_recon.settings.conf import CONF


@pytest.fixture
def tokens_ST() -> Tensor:
    """Three calibration and two held-out samples: not a multiple of the batch of two."""
    return torch.randint(3, 64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "ram"}, "store.kind='ram': expected one of device, memory, disk, auto"),
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


@pytest.mark.parametrize("kind", ["device", "memory", "disk", "auto"])
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


@pytest.mark.parametrize("propagation", PROPAGATIONS, ids=name_of)
def test_arrays_are_as_many_as_counted_by_hand(propagation: Propagation) -> None:
    assert (count_arrays(propagation, "keep"), count_arrays(propagation, "recompute")) == ARRAYS[name_of(propagation)]


def test_bytes_are_those_of_the_arrays() -> None:
    shape, room, gpu = (128, 2048, 4096), Room(), Room(device=torch.device("cuda", 0))  # 2**30 numbers
    assert StoreSettings(kind="memory").needed(shape, 2, room) == (2 * 2**32, 0, 0)
    assert StoreSettings(kind="memory", dtype="bfloat16").needed(shape, 2, room) == (2 * 2**31, 0, 0)
    assert StoreSettings(kind="memory").needed(shape, 2, gpu) == (2 * 2**31, 0, 0), "16 bits where a GPU reads them"
    assert StoreSettings(kind="disk").needed(shape, 3, room) == (0, 3 * 2**31, 0)
    assert StoreSettings(kind="disk", dtype="float32").needed(shape, 3, room) == (0, 3 * 2**32, 0)
    assert StoreSettings(kind="device").needed(shape, 2, gpu) == (0, 0, 2 * 2**31)
    assert StoreSettings(kind="device", dtype="float32").needed(shape, 2, gpu) == (0, 0, 2 * 2**32)


@pytest.mark.parametrize(
    ("free", "limit", "reserved", "kind"),
    [
        (2000, None, 0, "device"),  # two arrays of 250 numbers in 16 bits are 1000 bytes: half of it
        (1999, None, 0, "memory"),
        (5000, None, 3000, "device"),
        (5000, None, 3001, "memory"),  # training needs the rest
        (9000, 4000, 2001, "memory"),  # no more than the limit is free
        (100, None, 900, "memory"),
    ],
)
def test_auto_takes_a_gpus_memory_up_to_half_of_what_training_leaves(
    free: int, limit: int | None, reserved: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**6))
    room = Room(device=torch.device("cuda", 0), limit=limit, reserved=reserved)
    needed = StoreSettings(kind="auto").needed((5, 5, 10), 2, room)
    assert needed == ((0, 0, 1000) if kind == "device" else (1000, 0, 0))


def test_a_run_without_a_gpu_refuses_a_store_on_it(tmp_path: Path) -> None:
    settings = StoreSettings(kind="device")
    settings.check_device(torch.device("cuda", 1))
    with pytest.raises(ValueError, match=r"store=device: this run computes on the CPU.*store=memory.*or store=auto"):
        settings.check(tmp_path, (1, 1, 1), 1, Room())


def test_a_store_says_of_what_kind_it_is(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        assert kind_of(store) == "disk"
    assert kind_of(MemoryStore()) == "memory"
    assert kind_of(MemoryStore(torch.bfloat16, torch.device("meta"))) == "device"


@pytest.mark.parametrize(("available", "kind"), [(8000, "memory"), (7999, "disk")])
def test_auto_takes_memory_up_to_its_share_of_what_is_free(
    available: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    settings = StoreSettings(kind="auto")
    with caplog.at_level("INFO"), settings.open(tmp_path / "states", (5, 10, 10), 2, Room()) as store:  # 4000 bytes
        assert isinstance(store, {"memory": MemoryStore, "disk": DiskStore}[kind])
        assert store.dtype == {"memory": torch.float32, "disk": torch.bfloat16}[kind]
    (line,) = caplog.messages
    assert ("in memory" if kind == "memory" else str(tmp_path)) in line


def test_too_little_free_space_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=3 * 10**9))
    folder, shape = tmp_path / "not" / "there", (1000, 1000, 1000)  # 2 GB per array
    settings = StoreSettings(kind="disk")
    settings.check(folder, shape, 1, Room())
    StoreSettings(kind="memory").check(folder, shape, 100, Room())
    with pytest.raises(ValueError, match=r"need 4\.00 GB in .*, where 3\.00 GB are free.*store\.targets=recompute"):
        settings.check(folder, shape, 2, Room())
    assert set(asked) == {tmp_path} and not folder.exists()


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
    ("case", "propagation"), each("blocks", "overlapping blocks", "sequential halves", "parallel halves"), ids=title_of
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


def test_a_training_batch_is_prefetched_while_the_one_before_it_is_served(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    store = WatchedStore()
    chain = chain_in(model, tokens_ST, store=store)
    chain.dense_pass(layer_windows(model)[0])
    chain.passes.batching.num_samples = SAMPLES
    served_from = Activations.from_chain(chain).data_module(seed=3)
    loader = served_from.train_dataloader()
    for _ in range(2):  # epochs
        store.told.clear()
        served = []
        for rows_B in loader:
            served_from.transfer_batch_to_device(rows_B, torch.device("cpu"), 0)
            served.append(rows_B.tolist())
        assert sorted(itertools.chain(*served)) == list(range(SAMPLES))
        first, second, third = served
        told = [rows for what, rows in store.told if what == "prefetch"][::2]  # inputs, targets
        assert told == served
        order = [entry for entry in store.told if entry in (("prefetch", third), ("release", second))]
        assert order[0] == ("prefetch", third)


def fitted(tokens_ST: Tensor, run: Path, **settings: Any) -> tuple[WindowResult, list[Tensor]]:
    """The second layer of a tiny Llama, pruned and reconstructed, with its weights."""
    model = tiny_model("llama")
    chain = chain_in(model, tokens_ST, PROPAGATIONS[4], **settings)
    first, second, *_ = partition(model)
    chain.dense_pass(first)
    change(first.own_parameters(), seed=0)
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
