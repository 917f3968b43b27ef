"""Memory maps of files; tensors made when they are written. Commits test what is written, and read back."""

import io
import mmap
import sys
import weakref
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from lit_recon.system.tensor_files import memory_map, write_tensors


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


def test_tensors_made_one_at_a_time_give_the_bytes_of_safetensors() -> None:
    values = {"b": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "a": [[7.0, 8.0]], "c": [[9.0]]}
    made: list[weakref.ref[Tensor]] = []

    def make(name: str) -> Tensor:
        assert all(reference() is None for reference in made)
        tensor = torch.tensor(values[name]).T.contiguous().T  # whose rows do not follow each other in memory
        made.append(weakref.ref(tensor))
        return tensor

    layout = {name: torch.empty(len(rows), len(rows[0]), device="meta") for name, rows in values.items()}
    file = io.BytesIO()
    fingerprint = write_tensors(file, layout, {"format": "pt"}, make)
    expected = save({name: torch.tensor(rows) for name, rows in values.items()}, {"format": "pt"})
    assert file.getvalue() == expected and len(made) == 3
    assert fingerprint == {"bytes": len(expected), "crc32": zlib.crc32(expected)}
