"""The cache folder is where the environment says, or a temporary one; what is in it survives accidents."""

import pwd
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lit_recon.system import cache
from lit_recon.system.cache import cache_folder, cached_folder, usable_folder


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


ROOT = Path(__file__).parents[2]


class Build:
    """Writes two files and counts how often it did."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "weights").write_bytes(bytes(range(256)) * 20)
        (folder / "sub").mkdir()
        (folder / "sub" / "config").write_text("{}")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


ACCIDENTS = {
    "cut": lambda folder: (folder / "weights").write_bytes((folder / "weights").read_bytes()[:-1]),
    "bit": lambda folder: flip_bit(folder / "weights"),
    "bit in a small file": lambda folder: flip_bit(folder / "sub" / "config"),
    "file gone": lambda folder: (folder / "weights").unlink(),
    "manifest gone": lambda folder: (folder / cache.MANIFEST).unlink(),
    "manifest cut": lambda folder: (folder / cache.MANIFEST).write_text('{"weights": "51'),
    "empty manifest": lambda folder: (folder / cache.MANIFEST).write_text("{}"),
    "empty list as manifest": lambda folder: (folder / cache.MANIFEST).write_text("[]"),
    "manifest of another kind": lambda folder: (folder / cache.MANIFEST).write_text("[1]"),
    "bit in the manifest": lambda folder: flip_bit(folder / cache.MANIFEST),
    "empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_damaged_folder_is_noticed_announced_and_made_again(
    tmp_path: Path, accident: str, caplog: pytest.LogCaptureFixture
) -> None:
    build, folder = Build(), tmp_path / "models" / "m"
    cached_folder(folder, build)
    ACCIDENTS[accident](folder)
    assert cached_folder(folder, build) == folder
    assert build.calls == 2
    assert (folder / "weights").read_bytes() == bytes(range(256)) * 20 and (folder / "sub" / "config").exists()
    assert "is damaged" in caplog.text


def test_an_intact_folder_is_used_as_it_is_without_writing_anything(tmp_path: Path) -> None:
    build, folder = Build(), tmp_path / "m"
    cached_folder(folder, build)
    (tmp_path / "m.lock").unlink(missing_ok=True)
    (folder / ".DS_Store").write_text("of no concern")
    assert cached_folder(folder, build) == folder
    assert build.calls == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_a_killed_process_left_half_written_is_cleared_and_never_taken_for_a_result(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    script = "from lit_recon.system.cache import *; import os, sys; from pathlib import Path\n"
    script += "def build(f): (f / 'half').write_text('x'); os._exit(9)\ncached_folder(Path(sys.argv[1]), build)"
    assert subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT).returncode == 9
    assert not folder.exists() and [path.name for path in tmp_path.glob("*/half")] == ["half"]
    cached_folder(folder, Build())
    assert not list(tmp_path.glob("*/half")) and (folder / "weights").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_build_that_fails_or_is_interrupted_leaves_nothing_and_can_be_tried_again(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise error

    folder = tmp_path / "m"
    with pytest.raises(error):
        cached_folder(folder, fail)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert (cached_folder(folder, Build()) / "weights").exists()


def test_of_two_processes_at_once_one_builds_and_the_other_waits_for_its_result(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import logging, sys, time
        from pathlib import Path
        from lit_recon.system.cache import cached_folder
        logging.basicConfig(level=logging.INFO)
        folder = Path(sys.argv[1])
        def build(partial):
            with open(folder.parent / "builds", "a") as log:
                log.write("built ")
            (partial / "a").write_text("first")
            time.sleep(1.0)
            (partial / "b").write_text("second")
        found = cached_folder(folder, build)
        print((found / "a").read_text(), (found / "b").read_text())
    """)
    command = [sys.executable, "-c", script, str(tmp_path / "m")]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    results = [process.communicate() for process in processes]
    assert [out for out, _ in results] == ["first second\n"] * 3
    assert (tmp_path / "builds").read_text() == "built "
    assert sum("waiting for another run" in err for _, err in results) == 2


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("LIT_RECON_CACHE", raising=False)
    assert cache_folder() == tmp_path / "xdg" / "lit_recon"
    monkeypatch.setenv("LIT_RECON_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("LIT_RECON_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "lit_recon"
