"""Record of evaluations: evaluations.json next to a checkpoint, to which every evaluation adds an entry.

    {"version": 1, "evaluations": [{"when": ..., "checkpoint": ..., "perplexity": ..., "agreement": ..., ...}, ...]}

What was there stays, byte for byte in its meaning, and the file is whole at every moment.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from lit_recon.system.atomic_files import replaced
from lit_recon.system.finite import without_nan

VERSION = 1


def read_record(path: Path) -> list[dict[str, Any]]:
    """The evaluations in a file; none where there is no file.

    Raises:
        ValueError: It is something else, or damaged.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        evaluations = content["evaluations"]
        if not isinstance(evaluations, list):
            raise TypeError("evaluations is no list")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(
            f"{path} is no record of evaluations ({reason}); move it away, or give record=<file>."
        ) from error
    return evaluations


def check_record(path: Path) -> None:
    """Check that an evaluation can be added to a file.

    Raises:
        ValueError: The file is something else, or its folder cannot be written.
    """
    read_record(path)
    existing = next(folder for folder in (path.parent, *path.parent.absolute().parents) if folder.exists())
    try:
        probe = existing / f".{path.name}.writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); give record=<file>.") from error


def add(path: Path, evaluation: Mapping[str, Any]) -> None:
    """Add an evaluation to a file, whole or not at all; null for what is not finite.

    Raises:
        ValueError: The file has become something else.
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with FileLock(lock):  # two evaluations of one checkpoint may end together
        try:
            evaluations = [*read_record(path), without_nan(dict(evaluation))]
            with replaced(path) as file:
                content = json.dumps({"version": VERSION, "evaluations": evaluations}, indent=2, allow_nan=False)
                file.write((content + "\n").encode())
        finally:
            lock.unlink(missing_ok=True)
