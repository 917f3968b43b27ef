"""Lock of an output folder: it belongs to one process, which is named to others; a process that ended owns nothing."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from filelock import FileLock

from lit_recon.system.lock import hold

HOLD = """
import sys
from pathlib import Path
from lit_recon.system.lock import hold
try:
    with hold(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error, flush=True)
"""


def start(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that holds the folder until its input ends, and what it says."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_second_process_is_refused_and_the_message_names_the_owner(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    owner, said = start(folder)
    assert said == "held"
    since = json.loads((folder / "lease.json").read_text())["since"]
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(since)).total_seconds()) < 60
    message = (
        f"output_dir={folder} is in use by process {owner.pid} on {socket.gethostname()} since {since}; wait for it "
        "or stop it, or choose another output_dir."
    )
    second, said = start(folder)
    assert said == message
    second.communicate()
    with pytest.raises(ValueError, match=re.escape(message)), hold(folder):
        pass
    owner.communicate()  # it comes to its end
    assert list(folder.iterdir()) == []
    with hold(folder):
        assert json.loads((folder / "lease.json").read_text())["pid"] == os.getpid()


def test_the_folder_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    owner, said = start(tmp_path)
    assert said == "held"
    owner.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    owner.communicate()
    assert (tmp_path / "lease.json").exists()
    with hold(tmp_path):
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("about", [None, b"", b"\xff\xfe", b"[]", b'"text"', b"{}", b'{"pid": 1}'])
def test_a_garbled_owner_is_another_process(tmp_path: Path, about: bytes | None) -> None:
    with hold(tmp_path):
        (tmp_path / "lease.json").unlink()
        if about is not None:
            (tmp_path / "lease.json").write_bytes(about)
        with pytest.raises(ValueError, match="is in use by another process; wait"), hold(tmp_path):
            pass
        assert (tmp_path / "lease.lock").exists()


def test_it_is_released_by_an_error_and_when_the_folder_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of the run"), hold(tmp_path / "run"):
        raise RuntimeError("of the run")
    with hold(tmp_path / "run"):
        for path in (tmp_path / "run").iterdir():
            path.unlink()
        (tmp_path / "run").rmdir()
    with hold(tmp_path / "run"):
        assert (tmp_path / "run" / "lease.lock").exists()


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(lock: FileLock, **settings: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    (tmp_path / "lease.lock").touch()  # maybe another's
    for folder in (tmp_path, tmp_path / "run"):
        with pytest.raises(ValueError, match=r"output_dir=.* cannot be locked \(No locks available\)"), hold(folder):
            pass
    assert list((tmp_path / "run").iterdir()) == [] and (tmp_path / "lease.lock").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such owners")
def test_another_users_folder_is_refused_but_not_to_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    if owner == 0:  # what root has made is no trap
        with hold(tmp_path):
            pass
        os.chown(tmp_path, 4243, -1)
    with pytest.raises(ValueError, match=r"belongs to another user .*choose another output_dir"), hold(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with hold(tmp_path):
        pass


def test_a_process_that_found_a_lock_as_its_owner_removed_it_does_not_own_the_folder_next_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner lets go, and a third takes the folder, between the second's opening of the file and its lock."""
    fcntl = pytest.importorskip("fcntl")
    lock, others = fcntl.flock, []
    owner = hold(tmp_path)
    owner.__enter__()

    def flock(descriptor: int, operation: int) -> None:
        if not others and operation & fcntl.LOCK_EX:
            others.append(hold(tmp_path))
            owner.__exit__(None, None, None)
            others[0].__enter__()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match="is in use by"), hold(tmp_path):
        pass
    assert others
    others[0].__exit__(None, None, None)
