"""Commits: resume points survive what ends processes and damages files; expected states are those that were written."""

import errno
import json
import logging
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from conftest import mounted
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lit_recon.system import atomic_files, tensor_files
from lit_recon.system import commits as module
from lit_recon.system.commits import Commit, CommitError, Commits

SHARED, OLD, NEW = "layer.00001", "chain.00001", "chain.00002"


class Killed(BaseException):
    """Ends a simulated process."""


def chain(number: int) -> dict[str, Tensor]:
    return {"inputs": torch.full((3, 5), float(number), dtype=torch.bfloat16)}


def first(folder: Path) -> Commits:
    commits = Commits(folder)
    commits.write(SHARED, {"weight": torch.arange(12.0).view(3, 4)}, {"format": "pt"})
    commits.write(OLD, chain(1))
    commits.commit(1, {"windows": ["a"], "chain": OLD}, [SHARED, OLD])
    return commits


def second(commits: Commits) -> None:
    commits.write(NEW, chain(2))
    commits.commit(2, {"windows": ["a", "b"], "chain": NEW}, [SHARED, NEW])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two commits that share a file."""
    second(first(tmp_path / "commits"))
    return tmp_path / "commits"


def assert_whole(folder: Path, number: int) -> None:
    """The newest commit is this one, as it was written."""
    commit = Commits(folder).newest()
    assert commit is not None and commit.number == number
    name = f"chain.{number:05}"
    assert commit.state == {"windows": ["a", "b"][:number], "chain": name}
    assert torch.equal(commit.read(name)["inputs"], chain(number)["inputs"])
    assert torch.equal(commit.read(SHARED)["weight"], torch.arange(12.0).view(3, 4))


TENSORS = {
    "bool": torch.tensor([[True, False], [False, True], [True, True]]),
    "uint8": torch.arange(7, dtype=torch.uint8),
    "int64": torch.tensor([2**62, -1]),
    "bfloat16": torch.tensor([1.0, -0.0, float("inf"), 3e-39]).bfloat16(),
    "float16": torch.tensor([6e-8, 65504.0]).half(),
    "float64": torch.tensor([[[1 / 3]]], dtype=torch.float64),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "empty bfloat16": torch.empty(3, 0, dtype=torch.bfloat16),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "every second": torch.arange(10, dtype=torch.int32)[::2],
    "one of two": torch.arange(2.0)[1::2],
    "column": torch.arange(6.0).view(3, 2)[:, 1:],
    "expanded": torch.ones(1).expand(3, 2),
    "parameter": torch.nn.Parameter(torch.ones(3)),
    'a "name" ä': torch.zeros(1, dtype=torch.int8),
}


@pytest.mark.parametrize("chunk", [8, 1 << 24])
def test_tensors_of_every_kind_come_back_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(atomic_files, "CHUNK", chunk)
    monkeypatch.setattr(tensor_files, "CHUNK", chunk)
    commits = Commits(tmp_path)
    path = commits.write("all", TENSORS, {"shapes": "{}"})
    commits.write("nothing", {})
    commits.commit(1, {}, ["all", "nothing"])
    found = Commits(tmp_path).newest()
    assert found is not None and found.path("all") == path == commits.path("all") and found.read("nothing") == {}
    for tensors in (found.read("all"), load_file(path)):
        assert tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            expected = tensor.detach().clone(memory_format=torch.contiguous_format)
            assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape, name
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
            assert torch.equal(tensors[name].view(bits), expected.view(bits)), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"shapes": "{}"}


def test_a_file_that_is_larger_than_the_memory_is_read(tmp_path: Path) -> None:
    rows = 3 * (psutil.virtual_memory().total + psutil.swap_memory().total) // 2 // 4096
    entry = {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]}
    header = json.dumps({"inputs": entry}).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + rows * 4096)  # without blocks on the disk
        except OSError:
            pytest.skip("the file system has no files of this size")
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", 2.5))
    inputs = Commit(1, {}, {"large": path}).read("large")["inputs"]
    assert inputs.shape == (rows, 1024) and inputs[-1, -2:].tolist() == [0.0, 2.5]


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    tensors = load_file(Commits(tmp_path).write("tied", {"a": weight, "b": weight, "c": weight[2:]}))
    assert torch.equal(tensors["a"], weight) and torch.equal(tensors["b"], weight)
    assert torch.equal(tensors["c"], weight[2:])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
def test_a_mapped_tensor_is_not_copied_into_memory(tmp_path: Path) -> None:
    script = f"""
import threading, time, torch
from pathlib import Path
from lit_recon.system.commits import Commits
size = 200 << 20
Path({str(tmp_path / "big")!r}).write_bytes(b"")
tensor = torch.from_file({str(tmp_path / "big")!r}, shared=True, size=size // 2, dtype=torch.bfloat16)
def anonymous():
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("RssAnon"))
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
Commits(Path({str(tmp_path)!r})).write("big", {{"big": tensor}})
done.set()
thread.join()
print(peak[0] - before)
"""
    grown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 20 << 20


def test_no_commits_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "commits"
    assert Commits(folder).newest() is None
    commits = Commits(folder)
    commits.write("written but not committed", {})
    assert Commits(folder).newest() is None


@pytest.mark.parametrize("lost", ["folder", "manifests"])
def test_commits_that_are_gone_are_not_none(folder: Path, lost: str) -> None:
    for path in folder.glob("*.json"):
        path.unlink()
    if lost == "folder":
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="windows were done, but .*commits holds no commit any more"):
        Commits(folder).newest()


def test_looking_changes_nothing(folder: Path) -> None:
    (folder / f"{NEW}.safetensors").unlink()
    (folder / "stray.safetensors.partial").touch()
    before = sorted(folder.iterdir())
    assert_whole(folder, 1)
    assert sorted(folder.iterdir()) == before


def truncate(path: Path) -> str:
    size = path.stat().st_size
    os.truncate(path, size - 1)
    return f"{size - 1} bytes instead of {size}"


def empty(path: Path) -> str:
    size = path.stat().st_size
    os.truncate(path, 0)
    return f"0 bytes instead of {size}"


def remove(path: Path) -> str:
    path.unlink()
    return "missing"


def flip(path: Path, position: int | None = None, bit: int = 0) -> str:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content)) if position is None else position] ^= 1 << bit
    path.write_bytes(content)
    return "content changed"


@pytest.mark.parametrize("damage", [truncate, empty, remove, flip])
def test_a_damaged_file_is_named_and_the_commit_before_is_taken(
    folder: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], str]
) -> None:
    what = damage(folder / f"{NEW}.safetensors")
    with caplog.at_level(logging.WARNING):
        assert_whole(folder, 1)
    (message,) = caplog.messages
    assert f"commit 2 is damaged: {NEW}.safetensors: {what}; resuming from commit 1" in message


@pytest.mark.parametrize("damage", [truncate, remove, flip])
def test_a_damaged_file_of_both_commits_leaves_none(folder: Path, damage: Callable[[Path], str]) -> None:
    damage(folder / f"{SHARED}.safetensors")
    with pytest.raises(ValueError, match=f"commit 2.*{SHARED}.*commit 1.*{SHARED}.*Restore.*overwrite=true"):
        Commits(folder).newest()
    assert len(list(folder.glob("*.json"))) == 2 and (folder / f"{NEW}.safetensors").exists()  # nothing is lost


def test_a_flipped_bit_anywhere_in_a_file_is_found(folder: Path) -> None:
    path = folder / f"{NEW}.safetensors"
    whole = path.read_bytes()
    for position in range(len(whole)):
        flip(path, position, position % 8)
        assert_whole(folder, 1)
        path.write_bytes(whole)
    assert_whole(folder, 2)


def test_a_change_of_any_byte_of_a_manifest_is_found(folder: Path) -> None:
    manifest = folder / "00002.json"
    whole = manifest.read_bytes()
    assert json.loads(whole)["state"]["chain"] == NEW  # a person can read it

    def assert_falls_back() -> None:
        commit = Commits(folder).newest()
        assert commit is not None and commit.state == {"windows": ["a"], "chain": OLD}
        manifest.write_bytes(whole)

    for position in range(len(whole)):
        flip(manifest, position, random.randrange(8))
        assert_falls_back()
    for position in range(0, len(whole), 7):
        manifest.write_bytes(whole[:position])
        assert_falls_back()
        manifest.write_bytes(whole[:position] + b" " + whole[position:])
        assert_falls_back()
    manifest.write_bytes(whole + b"\n")
    assert_whole(folder, 1)
    manifest.write_bytes(whole)
    assert_whole(folder, 2)


def test_a_lost_manifest_leaves_the_commit_before(folder: Path) -> None:
    (folder / "00002.json").unlink()
    assert_whole(folder, 1)


def test_damaged_manifests_are_named(folder: Path) -> None:
    flip(folder / "00002.json", 3)
    (folder / "00001.json").write_bytes(b"")
    with pytest.raises(ValueError, match="00002.json: content changed.*00001.json: content changed"):
        Commits(folder).newest()


def test_another_format_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT", 3)
        commits = Commits(folder.parent / "later")
        commits.commit(1, {}, [])
    with pytest.raises(ValueError, match=r"00001.json has format 3, .* reads format 2"):
        Commits(folder.parent / "later").newest()


def test_two_commits_stay_and_what_they_do_not_need_goes(folder: Path) -> None:
    commits = Commits(folder)
    commits.newest()
    (folder / "chain.00009.safetensors.partial").touch()
    (folder / "notes.txt").touch()
    commits.write("unused", {})
    commits.write("chain.00003", chain(3))
    commits.commit(3, {}, [SHARED, "chain.00003"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "00002.json",
        "00003.json",
        "chain.00002.safetensors",
        "chain.00003.safetensors",
        f"{SHARED}.safetensors",
        "notes.txt",
    ]
    (folder / "chain.00003.safetensors").unlink()
    assert_whole(folder, 2)


def test_a_file_that_is_still_mapped_goes_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = Commits(folder)
    commits.newest()
    with monkeypatch.context() as patch:

        def refuse(path: Path, missing_ok: bool = False) -> None:
            raise PermissionError(errno.EACCES, "in use")

        patch.setattr(Path, "unlink", refuse)
        commits.commit(3, {}, [SHARED])
    assert (folder / f"{OLD}.safetensors").exists()
    commits.commit(4, {}, [SHARED])
    assert sorted(path.name for path in folder.iterdir()) == ["00003.json", "00004.json", f"{SHARED}.safetensors"]


def test_a_damaged_commit_never_comes_back(folder: Path) -> None:
    whole = (folder / f"{NEW}.safetensors").read_bytes()
    flip(folder / f"{NEW}.safetensors")
    os.replace(folder / "00002.json", folder / "00005.json")
    commits = Commits(folder)
    commit = commits.newest()
    assert commit is not None and commit.number == 1
    second(commits)
    assert sorted(path.name for path in folder.glob("*.json")) == ["00001.json", "00002.json"]
    (folder / f"{NEW}.safetensors").write_bytes(whole)
    assert_whole(folder, 2)


def test_a_new_run_does_not_resume_the_run_before_it(folder: Path) -> None:
    commits = Commits(folder)
    commits.commit(1, {"new": True}, [])
    assert sorted(path.name for path in folder.iterdir()) == ["00001.json"]


def test_misuse_is_caught(folder: Path) -> None:
    commits = Commits(folder)
    commits.newest()
    with pytest.raises(RuntimeError, match="commit 2 after 2"):
        commits.commit(2, {}, [])
    with pytest.raises(RuntimeError, match="never written.*other"):
        commits.commit(3, {}, ["other"])
    with pytest.raises(RuntimeError, match=f"{NEW} belongs to commit 2"):
        commits.write(NEW, chain(3))


def steps(monkeypatch: pytest.MonkeyPatch, fail: Callable[[str], None]) -> None:
    """Call `fail` before each step by which the disk changes, with its name."""

    def patched(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def step(*args: object, **kwargs: object) -> object:
            fail(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, step)

    for owner, name in (
        (atomic_files.os, "replace"),
        (atomic_files.os, "fsync"),
        (atomic_files.zlib, "crc32"),  # between two writes
        (Path, "unlink"),
        (Path, "open"),
    ):
        patched(owner, name)


def killed_at(folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Make the second commit in a process that dies at this step; whether it came that far."""
    commits = Commits(folder)
    commits.newest()
    count = 0

    def die(name: str) -> None:
        nonlocal count
        count += 1
        if count >= step:  # a dead process does not clean up either
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "CHUNK", 16)
        steps(patch, die)
        try:
            second(commits)
        except Killed:
            return True
    return False


def test_a_kill_at_any_step_leaves_the_old_or_the_new_commit_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first(tmp_path / "start")
    (tmp_path / "start" / "00009.json").write_bytes(b"damaged")  # by which a step more is taken
    found = []
    for step in range(1, 100):
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "start", folder)
        killed = killed_at(folder, step, monkeypatch)
        commits = Commits(folder)
        commit = commits.newest()
        assert commit is not None
        assert_whole(folder, commit.number)
        found.append(commit.number)
        if commit.number == 1:  # and a run that is resumed there makes the same commit
            second(commits)
            assert_whole(folder, 2)
            assert not list(folder.glob("*.partial")) and not (folder / "00009.json").exists()
        if not killed:
            break
    assert not killed and len(found) > 12
    assert found == sorted(found) and {1, 2} == set(found)  # one step makes the difference


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_at_any_step_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = tmp_path / "run" / "commits"
    first(folder)
    for step in range(1, 20):
        commits = Commits(folder)
        commits.newest()
        count = 0

        def fail(name: str, step: int = step) -> None:
            nonlocal count
            count += name != "unlink"
            if count == step and name != "unlink":
                raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            steps(patch, fail)
            with pytest.raises(CommitError) as raised:
                second(commits)
        message = str(raised.value)
        assert NEW in message or "00002.json" in message
        assert os.strerror(number) in message and "the previous commit is whole; " in message
        assert message.endswith(f"and resume with resume={tmp_path / 'run'}")
        assert ("free space" in message) == (number in (errno.ENOSPC, errno.EDQUOT))
        assert not list(folder.glob("*.partial"))
        if (folder / "00002.json").exists():  # the very last step: syncing the folder
            break
        assert_whole(folder, 1)
    assert step == 10  # 5 for the file, 5 for the manifest
    assert_whole(folder, 2)


def test_before_the_first_commit_the_message_does_not_promise_one(tmp_path: Path) -> None:
    commits = Commits(tmp_path / "commits")
    with pytest.raises(CommitError, match="report.html.*nothing is committed yet; free space and resume with"):
        with commits.writing(tmp_path / "report.html"):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_what_fails_elsewhere_is_named_and_not_said_to_be_in_the_runs_folder(tmp_path: Path) -> None:
    commits = Commits(tmp_path / "run" / "commits")
    with pytest.raises(CommitError) as raised, commits.writing(tmp_path / "run"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/words.txt")
    assert str(raised.value) == (
        "/elsewhere/words.txt, which is not of this run: Permission denied; nothing is committed yet; see to that and "
        f"resume with resume={tmp_path / 'run'}"
    )
    with pytest.raises(CommitError, match=r"run cannot be written \(Permission denied\); .*make the folder writable"):
        with commits.writing(tmp_path / "run"):
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "run" / "report.html"))


def test_too_many_open_files_are_told_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(CommitError, match=r"Too many open files\).*allow more open files \(ulimit -n\) and resume"):
        with Commits(tmp_path / "commits").writing(tmp_path):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="I/O") as raised, Commits(tmp_path).writing(tmp_path / "any"):
        raise OSError(errno.EIO, "I/O error")
    assert not isinstance(raised.value, CommitError)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    with mounted(tmp_path / "disk", "1m") as disk:
        yield disk


def test_a_full_disk_keeps_the_commit_and_more_can_be_committed_once_there_is_space(small_disk: Path) -> None:
    folder = small_disk / "run" / "commits"
    commits = first(folder)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(500 << 10))
    with pytest.raises(CommitError, match=f"No space left.*the previous commit is whole; free space .*{folder.parent}"):
        commits.write("large", {"a": torch.ones(700 << 10, dtype=torch.uint8)})
    assert not list(folder.glob("large*"))
    with pytest.raises(RuntimeError, match="never written.*large"):
        commits.commit(2, {}, ["large"])
    assert_whole(folder, 1)
    second(commits)
    ballast.unlink()
    commits.write("large", {"a": torch.ones(700 << 10, dtype=torch.uint8)})
    commits.commit(3, {}, ["large"])
    assert Commits(folder).newest().number == 3


def test_a_folder_on_a_read_only_disk_is_named_with_the_remedy(small_disk: Path) -> None:
    commits = first(small_disk / "commits")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CommitError, match="Read-only.*previous commit is whole; make the folder writable and resume"):
        second(commits)
    assert_whole(small_disk / "commits", 1)


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits, taken = first(tmp_path), []
    with monkeypatch.context() as patch:
        steps(patch, taken.append)
        second(commits)
    file, manifest = ["open", "crc32", "crc32", "fsync", "replace"], ["open", "fsync", "replace"]
    assert taken == [*file, "fsync", *manifest, "fsync"]  # the folder's names: before and after the manifest
