"""Atomic files: published or not, synced on each system; commits test the rest, step by step."""

import errno
import os
import sys
from pathlib import Path

import pytest

from lit_recon.system.atomic_files import publish, replaced_folder


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
