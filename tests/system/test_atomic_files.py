"""Atomic files: published or not, synced on each system; commits test the rest, step by step."""

import errno
import os
import sys
from pathlib import Path

import pytest

from lit_recon.system import atomic_files
from lit_recon.system.atomic_files import can_link, make_folder, publish, remove, replaced, replaced_folder, sync_folder


class Killed(BaseException):
    """Ends a simulated process, which cleans nothing up."""


def fill(partial: Path, text: str) -> None:
    (partial / "within").mkdir(parents=True)
    (partial / "within" / "file").write_text(text)


def tree(folder: Path) -> dict[str, str]:
    """Names and content of all below a folder."""
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else "" for path in folder.rglob("*")}


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_published_in_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("new")
    target.write_text("old")
    (tmp_path / "target.partial").write_text("left by a process that was killed")
    if not links:

        def refuse(source: Path, target: Path) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    for _ in range(2):
        publish(source, target)
        assert target.read_text() == source.read_text() == "new"
        assert target.samefile(source) == links
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_what_cannot_be_published_leaves_the_target(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "absent", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"] and (tmp_path / "target").read_text() == "old"


def test_on_windows_folders_are_not_opened_and_files_are_synced_by_descriptors_that_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    modes = []
    monkeypatch.setattr(os, "fsync", lambda number: modes.append(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE))
    for system in ("linux", "win32"):
        monkeypatch.setattr(sys, "platform", system)
        with replaced_folder(tmp_path / system) as partial:
            partial.mkdir()
            (partial / "file").write_text("content")
        assert (tmp_path / system / "file").read_text() == "content"
    assert modes == [os.O_RDONLY, os.O_RDONLY, os.O_RDONLY, os.O_RDWR]  # folder, file and parent; file


def test_each_kind_of_thing_is_removed_and_never_what_a_link_points_to(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    fill(elsewhere, "kept")
    (tmp_path / "link").symlink_to(elsewhere)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    fill(tmp_path / "folder", "gone")
    for name in ("link", "broken", "file", "folder", "nothing"):
        remove(tmp_path / name)
    assert tree(tmp_path) == {"elsewhere": "", "elsewhere/within": "", "elsewhere/within/file": "kept"}


def test_a_folder_is_made_in_place_of_a_file_and_of_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("file", "broken", "link", "deep/er"):
        make_folder(tmp_path / name)
        (tmp_path / name / "content").touch()
    assert (tmp_path / "there" / "content").exists() and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("kind", ["folder", "link", "file", "nothing"])
def test_a_folder_takes_the_place_of_whatever_is_there(tmp_path: Path, kind: str) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    fill(elsewhere, "kept")
    if kind == "folder":
        fill(folder, "old")
    elif kind == "link":
        folder.symlink_to(elsewhere)
    elif kind == "file":
        folder.touch()
    fill(tmp_path / "folder.partial", "left by a process that was killed")
    with replaced_folder(folder) as partial:
        fill(partial, "new")
    assert tree(folder) == {"within": "", "within/file": "new"} and not folder.is_symlink()
    assert tree(elsewhere) == {"within": "", "within/file": "kept"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "folder"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, replace = tmp_path / "folder", os.replace
    fill(folder, "old")
    for failing in range(3):  # as it is filled, as the old is renamed aside, as the new is renamed in
        calls = []

        def fail(source: Path, target: Path, calls: list = calls, failing: int = failing) -> None:
            calls.append(source)
            if len(calls) == failing:
                raise OSError(errno.EIO, "I/O error")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="I/O error"), replaced_folder(folder) as partial:
            fill(partial, "new")
            if not failing:
                raise OSError(errno.EIO, "I/O error")
        assert tree(tmp_path) == {"folder": "", "folder/within": "", "folder/within/file": "old"}


def test_a_kill_between_the_two_renames_loses_neither_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, replace = tmp_path / "folder", os.replace
    fill(folder, "old")

    def die(source: Path, target: Path) -> None:
        if source.suffix == ".partial":
            monkeypatch.undo()
            monkeypatch.setattr(atomic_files, "remove", lambda path: None)  # a dead process does not clean up either
            monkeypatch.setattr(os, "replace", lambda source, target: None)
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Killed), replaced_folder(folder) as partial:
        fill(partial, "new")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.old", "folder.partial"]
    with pytest.raises(RuntimeError), replaced_folder(folder):  # the next one fails early
        raise RuntimeError
    assert tree(tmp_path) == {"folder": "", "folder/within": "", "folder/within/file": "old"}


def test_all_of_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    fsync, replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        taken.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(tmp_path)}")
        fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        taken.append(f"{source.name} -> {target.name}")
        replace(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("the system does not tell what is open")
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    fill(tmp_path / "folder", "old")
    with replaced_folder(tmp_path / "folder") as partial:
        fill(partial, "new")
    *content, aside, renamed, names = taken
    files = {"sync folder.partial", "sync folder.partial/within", "sync folder.partial/within/file"}
    assert set(content) == files and len(content) == 3
    assert [aside, renamed, names] == ["folder -> folder.old", "folder.partial -> folder", "sync ."]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_that_cannot_sync_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic_files, "_unsynced", set())
    monkeypatch.setattr(os, "fsync", refuse)
    for _ in range(2):
        with replaced(tmp_path / "file") as file:
            file.write(b"content")
        with replaced_folder(tmp_path / "folder") as partial:
            fill(partial, "content")
        sync_folder(tmp_path)
    assert (tmp_path / "file").read_text() == "content" and tree(tmp_path / "folder")["within/file"] == "content"
    (message,) = caplog.messages
    assert "its file system cannot sync what is written" in message and os.strerror(number) in message


def test_a_disk_that_fails_to_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="I/O error"), replaced(tmp_path / "file"):
        pass
    with pytest.raises(OSError, match="I/O error"):
        sync_folder(tmp_path)


@pytest.mark.parametrize("target", ["precious", "absent"])
def test_what_others_have_planted_is_not_written_through(tmp_path: Path, target: str) -> None:
    folder, precious = tmp_path / "folder", tmp_path / "precious"
    folder.mkdir()
    precious.write_text("mine")
    for name in ("file.partial", "published.partial", "folder.partial"):
        (folder / name).symlink_to(tmp_path / target)
    with replaced(folder / "file") as file:
        file.write(b"new")
    publish(folder / "file", folder / "published")
    with replaced_folder(folder / "folder") as partial:
        fill(partial, "new")
    assert precious.read_text() == "mine" and sorted(path.name for path in tmp_path.iterdir()) == ["folder", "precious"]
    assert (folder / "file").read_text() == (folder / "published").read_text() == "new"
    assert not any(path.is_symlink() for path in folder.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has other modes")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_of_files_honour_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with replaced(tmp_path / "file"):
            pass
        with replaced_folder(tmp_path / "folder") as partial:
            fill(partial, "content")
            (partial / "within" / "file").chmod(0o600)  # as safetensors does
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    for path in (tmp_path / "file", tmp_path / "folder" / "within" / "file"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_whether_there_are_links_is_found_out_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_link(tmp_path) and not list(tmp_path.iterdir())

    def die(source: Path, target: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", die)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        with pytest.raises(Killed):
            can_link(tmp_path)
    assert list(tmp_path.iterdir())
    assert can_link(tmp_path) and not list(tmp_path.iterdir())  # also of those that were killed
