"""Commits, the resume points of a run: safetensors files in a folder, and one JSON manifest per commit.

A commit is a state and the files that it names. Files are written first, each whole or not at all; then the commit
becomes current by a single rename of its manifest, so that the newest manifest is always that of a whole commit,
whatever ends a process. Size and CRC-32 in the manifest find files that were truncated or changed on the disk since
then; for that case the commit before the newest is kept. A mark next to the folder, made with the first commit, finds
that all of them are gone. They guard against accidents, not against malice.
"""

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_recon.system.atomic_files import FULL, READ_ONLY, Fingerprint, fingerprint, make_folder, replaced, sync_folder
from lit_recon.system.command_line import as_argument
from lit_recon.system.tensor_files import map_tensors, write_tensors

log = logging.getLogger(__name__)

FORMAT = 2  # raised when what a commit says of a run is said otherwise
MARK = "commits.begun"  # next to the folder
_REMEDIES = {
    **dict.fromkeys(FULL, "free space"),
    **dict.fromkeys(READ_ONLY, "make the folder writable"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n)"),
}


class CommitError(OSError):
    """What a run needs of the system and does not get, such as room on a disk. The message says how to resume."""


@dataclass(frozen=True)
class Commit:
    """A whole commit.

    Attributes:
        number: Number of the commit; later commits have larger numbers.
        state: The state given to `Commits.commit`, as JSON gives it back: tuples are lists, keys are strings.
        paths: Path of each file by name.
    """

    number: int
    state: dict[str, Any]
    paths: Mapping[str, Path]

    def path(self, name: str) -> Path:
        """Path of a file."""
        return self.paths[name]

    def read(self, name: str) -> dict[str, Tensor]:
        """Tensors of a file, mapped into memory, which may be smaller; to be looked at or copied, not to be changed."""
        return map_tensors(self.paths[name])


class Commits:
    """Commits of a run: writes them, keeps the newest two, and finds the newest that is whole.

    Args:
        folder: Folder of the commits, inside the run's output folder; made when something is written.
        resumed: Whether the commits already in it belong to this run.
    """

    def __init__(self, folder: Path, *, resumed: bool = False) -> None:
        self.folder, self.resumed, self.mark = folder, resumed, folder.with_name(MARK)
        self._written: dict[str, Fingerprint] = {}
        self._current: int | None = None
        self._in_use: set[str] = set()  # files of the current commit

    def path(self, name: str) -> Path:
        """Path of a file, written or not."""
        return self.folder / f"{name}.safetensors"

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
        """Write a file that a commit can then refer to, whole or not at all.

        Tensors may be larger than the memory if they are mapped: no contiguous one is copied as a whole.

        Args:
            name: A name that the current commit does not use.
            tensors: The file's content.
            metadata: Texts for the header of the file.

        Returns:
            The safetensors file.

        Raises:
            CommitError: The disk is full or read-only.
        """
        if name in self._in_use:
            raise RuntimeError(f"{name} belongs to commit {self._current}")
        path = self.path(name)
        self._written.pop(name, None)
        with self.writing(path):
            self._make_folder()
            with replaced(path) as file:
                fingerprint = write_tensors(file, tensors, metadata or {})
        self._written[name] = fingerprint
        return path

    def commit(self, number: int, state: Mapping[str, Any], files: Sequence[str]) -> None:
        """Make a commit the current commit, then remove files that neither it nor the previous commit needs.

        Args:
            number: Larger than that of the current commit.
            state: Values that JSON can hold.
            files: Names of files that were written before, or belong to the commit that `newest` found.

        Raises:
            CommitError: The disk is full or read-only.
        """
        if self._current is not None and number <= self._current:
            raise RuntimeError(f"commit {number} after {self._current}")
        if absent := set(files) - set(self._written):
            raise RuntimeError(f"never written: {sorted(absent)}")
        kept = {name: self._written[name] for name in files}
        manifest = self._manifest(number)
        with self.writing(manifest):
            self._make_folder()
            self._remove_newer(number)
            sync_folder(self.folder)  # the names of the files are on the disk before the manifest's
            with replaced(manifest) as file:
                file.write(_seal({"format": FORMAT, "state": state, "files": kept}))
            sync_folder(self.folder)
        previous, self._current = self._current, number
        needed = self._in_use | set(kept)
        self._in_use = set(kept)
        self._written = {name: self._written[name] for name in needed}
        self._remove_unneeded({number, previous}, needed)
        if not self.mark.exists():
            with self.writing(self.mark), replaced(self.mark) as file:
                file.write(b"Windows of this run are done; resume needs the folder commits/.\n")

    def newest(self) -> Commit | None:
        """Find the newest commit that is whole and make it the current commit; None if there were no commits yet.

        Raises:
            ValueError: All commits are damaged or gone, or another version wrote them.
        """
        damaged = []
        for number in sorted(self._numbers(), reverse=True):
            try:
                content = self._verified(number)
            except _Damage as damage:
                damaged.append(f"commit {number} is damaged: {damage}")
                continue
            for line in damaged:
                log.warning("%s: %s; resuming from commit %d", self.folder, line, number)
            self._current, self._written = number, dict(content["files"])
            self._in_use = set(self._written)
            return Commit(number, content["state"], {name: self.path(name) for name in self._written})
        if damaged:
            raise ValueError(
                f"{self.folder}: {'; '.join(damaged)}. Restore a commit's files, or start anew with overwrite=true."
            )
        if self.mark.exists():
            raise ValueError(
                f"resume={self.folder.parent}: windows were done, but {self.folder} holds no commit any more. Put its "
                "files back, or start anew with overwrite=true."
            )
        return None

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Turn errors of a full or read-only disk, and of too many open files, into a CommitError with the remedy.

        Args:
            path: What is written, a file or a folder; named unless the error itself names something outside of the run.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in _REMEDIES:
                raise
            run, named = self.folder.parent, error.filename
            elsewhere = isinstance(named, (str, bytes)) and not _lies_in(Path(os.fsdecode(named)), run)
            what = f"{os.fsdecode(named)}, which is not of this run:" if elsewhere else f"{path} cannot be written"
            reason = error.strerror if elsewhere else f"({error.strerror})"
            kept = "the previous commit is whole" if self._is_committed() else "nothing is committed yet"
            remedy = "see to that" if elsewhere else _REMEDIES[error.errno]
            raise CommitError(
                f"{what} {reason}; {kept}; {remedy} and resume with {as_argument('resume', run)}"
            ) from error

    def _is_committed(self) -> bool:
        """Whether this run has a commit, also before `newest` was called; not if it is a commit that it overwrites."""
        return self._current is not None or (self.resumed and bool(self._numbers()))

    def _manifest(self, number: int) -> Path:
        return self.folder / f"{number:05}.json"

    def _numbers(self) -> list[int]:
        """Numbers of the manifests in the folder."""
        return [int(path.stem) for path in self.folder.glob("*.json") if re.fullmatch(r"\d{5,}", path.stem)]

    def _verified(self, number: int) -> dict[str, Any]:
        """Content of a manifest; _Damage if it or any of its files is not whole."""
        manifest = self._manifest(number)
        try:
            content = _unseal(manifest.read_bytes())
        except OSError as error:
            raise _Damage(f"{manifest.name}: {error.strerror}") from error
        except ValueError as error:
            raise _Damage(f"{manifest.name}: content changed") from error
        if content["format"] != FORMAT:
            raise ValueError(
                f"{manifest} has format {content['format']}, and this version of lit_recon reads format {FORMAT}; go "
                "on with the version that wrote it, or start anew with overwrite=true."
            )
        for name, expected in content["files"].items():
            _check(self.path(name), expected)
        return content

    def _make_folder(self) -> None:
        if not self.folder.is_dir():
            make_folder(self.folder)
            sync_folder(self.folder.parent)

    def _remove_newer(self, number: int) -> None:
        """Remove manifests with larger numbers than the current commit: damaged ones, or all if a run starts anew.

        Otherwise a new commit with a lower number would not be the newest when the run is resumed.
        """
        for other in self._numbers():
            if other != number and (self._current is None or other > self._current):
                self._manifest(other).unlink()

    def _remove_unneeded(self, numbers: set[int | None], needed: set[str]) -> None:
        """Remove manifests and files that are not needed, and partial files that killed processes left.

        A file that cannot be removed, for example because it is mapped on Windows, is tried again at the next commit.
        """
        manifests = [self._manifest(number) for number in self._numbers() if number not in numbers]
        files = set(self.folder.glob("*.safetensors")) - {self.path(name) for name in needed}
        for path in (*manifests, *files, *self.folder.glob("*.partial")):
            try:
                path.unlink()
            except OSError as error:
                log.info("%s is not needed any more, but cannot be removed (%s)", path, error.strerror)


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is that of a folder or of something in it, also where it is not there."""
    return path.resolve().is_relative_to(folder.resolve())


class _Damage(Exception):
    """A file of a commit is not as it was written."""


def _check(path: Path, expected: Fingerprint) -> None:
    """Raise _Damage if a file is not as it was written."""
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise _Damage(f"{path.name}: {size} bytes instead of {expected['bytes']}")
        changed = fingerprint(path) != expected
    except FileNotFoundError as error:
        raise _Damage(f"{path.name}: missing") from error
    except OSError as error:  # a bad block, for example
        raise _Damage(f"{path.name}: {error.strerror}") from error
    if changed:
        raise _Damage(f"{path.name}: content changed")


def _seal(content: Mapping[str, Any]) -> bytes:
    """Manifest of a commit: JSON that begins with the checksum of all the rest."""
    return _sealed(json.dumps(content, indent=1).encode())


def _unseal(manifest: bytes) -> dict[str, Any]:
    """Content of a manifest; a ValueError if it is not byte for byte as `_seal` made it."""
    rest = b"{" + manifest[len(_sealed(b"{")) :]
    if _sealed(rest) != manifest:
        raise ValueError("the checksum does not match")
    return json.loads(rest)


def _sealed(rest: bytes) -> bytes:
    return b'{\n "sha256": "%s",' % hashlib.sha256(rest).hexdigest().encode() + rest[1:]
