"""Lock of an output folder: one process per folder. The system frees the lock when its owner ends, however it ends."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold an output folder for this process alone.

    `lease.lock` is locked (flock; on Windows msvcrt.locking), and `lease.json` names the owner. A process that was
    killed holds nothing any more: the next process takes the folder over. On a file system without flock, filelock
    warns, and the existence of `lease.lock` is the lock; if a killed process left that file, the next process takes it
    over on the same machine, and on another machine it must be removed by hand. On NFS, the server decides whether
    locks hold between machines.

    Args:
        folder: The output folder; made if it is missing.

    Raises:
        ValueError: Another process, or this one, has it already, it cannot be locked, or it is another user's.
    """
    lock, about = FileLock(folder / "lease.lock"), folder / "lease.json"
    found = Path(lock.lock_file).exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_owner(folder)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(
            f"output_dir={folder} is in use by {_owner(about)}; wait for it or stop it, or choose another output_dir."
        ) from error
    except OSError as error:
        if not found:  # it was made, and cannot be locked
            with suppress(OSError):
                Path(lock.lock_file).unlink()
        raise ValueError(
            f"output_dir={folder} cannot be locked ({error.strerror}); choose another output_dir."
        ) from error
    try:
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        with suppress(OSError):  # of a full disk: only the lock matters
            about.write_text(json.dumps(owner), encoding="utf-8")
        yield
    finally:
        for path in (about, Path(lock.lock_file)):  # before the release: after it, they may be another process's
            with suppress(OSError):  # Windows removes no open file, and the folder may be gone
                path.unlink()
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process holds a folder now, found out without writing there; the lock is taken for a moment at most.

    Of a folder that only its owner may write to, what lease.json says counts.
    """
    lock, about = folder / "lease.lock", folder / "lease.json"
    if not lock.exists() or _has_ended(about):
        return False
    try:
        with FileLock(lock, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:
        return about.exists()


def _has_ended(about: Path) -> bool:
    """Whether lease.json names a process of this machine that is no more."""
    try:
        owner = json.loads(about.read_text(encoding="utf-8"))
        return owner["host"] == socket.gethostname() and not psutil.pid_exists(int(owner["pid"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):  # not written yet, or garbled
        return False


def _check_owner(folder: Path) -> None:
    """Raise a ValueError for another user's folder: where that one puts links, a run would write elsewhere.

    Not for root, who works on mounted folders of others in containers.
    """
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        return
    owner = folder.stat().st_uid
    if owner not in (0, os.geteuid()):
        raise ValueError(
            f"output_dir={folder} belongs to another user (number {owner}); choose another output_dir, or copy the run "
            "to a folder of your own."
        )


def _owner(about: Path) -> str:
    """Owner of the lock, from lease.json if that can be read."""
    try:
        owner = json.loads(about.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # not written yet, or garbled
        return "another process"
