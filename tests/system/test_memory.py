"""Memory of a process: the peak on each system, and that it can be counted anew."""

import errno
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from lit_recon.system.memory import peak_memory_bytes, reset_peak_memory

CPU, MIB = torch.device("cpu"), 1 << 20
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")


@LINUX
def test_on_linux_the_peak_is_that_since_the_last_reset() -> None:
    reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    torch.ones(200 * MIB, dtype=torch.uint8)
    risen = peak_memory_bytes(CPU) - before
    assert 180 * MIB < risen < 300 * MIB
    reset_peak_memory(CPU)
    assert peak_memory_bytes(CPU) < before + 100 * MIB


@LINUX
@pytest.mark.parametrize(("system", "unit"), [("freebsd14", 1024), ("darwin", 1)])
def test_other_unix_systems_count_in_kib_and_macos_in_bytes(
    monkeypatch: pytest.MonkeyPatch, system: str, unit: int
) -> None:
    import resource

    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=12345))
    monkeypatch.setattr(sys, "platform", system)
    assert peak_memory_bytes(CPU) == 12345 * unit
    reset_peak_memory(CPU)  # does nothing there


def test_on_windows_the_peak_is_that_of_the_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=12345))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_memory_bytes(CPU) == 12345
    reset_peak_memory(CPU)


def test_where_proc_cannot_be_read_or_written_the_peak_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *given: object, **settings: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(sys, "platform", "linux")
    expected = peak_memory_bytes(CPU)
    monkeypatch.setattr(Path, "write_text", refuse)
    reset_peak_memory(CPU)
    assert peak_memory_bytes(CPU) >= expected
    for text in (refuse, lambda path: "", lambda path: "Name: python"):
        monkeypatch.setattr(Path, "read_text", text)
        assert peak_memory_bytes(CPU) > 10 * MIB
