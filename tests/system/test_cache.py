"""The cache folder is where the environment says, or a temporary one where there is none."""

import pwd
from pathlib import Path

import pytest

from lit_recon.system.cache import cache_folder, usable_folder


@pytest.fixture(autouse=True)
def without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIT_RECON_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def check_temporary(caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """The cache folder is the same temporary one in every call, and one line says so."""
    first = cache_folder()
    assert first.is_dir() and first.name.startswith("lit_recon-") and cache_folder() == first
    assert len(caplog.records) == 1
    assert reason in caplog.text and "set LIT_RECON_CACHE to a folder that can be written" in caplog.text


def test_without_a_home_the_cache_is_a_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as in a container without an entry for the user
    check_temporary(caplog, "Could not determine home directory")


def test_with_a_home_that_cannot_be_written_the_cache_is_a_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", "/proc/nobody")
    check_temporary(caplog, "/proc/nobody/.cache/lit_recon: No such file or directory")


def test_a_folder_that_can_only_be_read_is_used_unless_it_shall_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    assert usable_folder(tmp_path, remedy="") == tmp_path
    assert usable_folder(tmp_path, remedy="", written=True) != tmp_path
