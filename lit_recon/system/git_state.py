"""State of the git repository in which files lie: its commit, and whether it, or one of the files, differs from that.

Nothing of the repository runs: a file system monitor that its configuration names is not asked.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECONDS = 10  # until git is given up, on a slow disk
_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # which would lead git to another repository


def git_state(folder: Path, files: Sequence[Path], *, only_known: bool = False) -> dict[str, Any] | None:
    """State of the repository that a folder lies in.

    Args:
        folder: Where to look.
        files: Files in it that count; no others are looked for among those that git does not know.
        only_known: Whether a repository that does not know these files is none: they lie in it by chance.

    Returns:
        `repository` (its folder), `commit` (None before the first) and `dirty`: whether a file that git knows has
        changed since, or git does not know one of `files`. None: there is no git, no repository, or no answer.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None:
        return None
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
    known = _git(folder, "ls-files", "--error-unmatch", "--", *map(str, files)) is not None
    if only_known and not known:
        return None
    return {"repository": top, "commit": commit, "dirty": not known or commit is None or changed != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, without the end of its last line; None where it fails."""
    settings = ["-c", "core.fsmonitor=false", "--no-optional-locks"]
    environment = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    try:
        ended = subprocess.run(
            ["git", "-C", str(folder), *settings, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if ended.returncode else ended.stdout.decode(errors="backslashreplace").rstrip("\n")
