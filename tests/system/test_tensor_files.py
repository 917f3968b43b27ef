"""Memory maps of files; commits test the tensors that are written."""

import mmap
import sys
from pathlib import Path

import pytest

from lit_recon.system.tensor_files import memory_map


def test_a_map_keeps_no_descriptor_open_where_python_can_do_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    asked = []

    def record(number: int, length: int, **settings: object) -> bytes:
        asked.append(settings)
        return b""

    monkeypatch.setattr(mmap, "mmap", record)
    for system in ("linux", "win32"):
        monkeypatch.setattr(sys, "platform", system)
        with (tmp_path / "file").open("rb") as file:
            memory_map(file, 7, offset=0)
    untracked = {"trackfd": False} if sys.version_info >= (3, 13) else {}
    assert asked == [{"offset": 0} | untracked, {"offset": 0}]
