"""Files: text of the user's own, in files of the formats that lit_recon.data.formats reads.

A row of a .json, .jsonl, .csv or .parquet file is a document, a .txt or .md file is one. The text is divided in its
order: the first 70% of the characters for calibration, the next 10% held out, the last 20% for evaluation; or 90% and
10% where evaluation has files of its own. A document in which a part ends is divided between two paragraphs or
sentences, so that a file of one line, or of one giant row, can be divided too.
"""

import glob
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lit_recon.data.documents import WHOLE_CHARACTERS, check_field, cut, joined, read_document
from lit_recon.data.formats import COMPRESSIONS, FORMATS, is_plain, rows, text_format
from lit_recon.data.source import Part, TextSource

log = logging.getLogger(__name__)

PASSAGE = 200  # characters: what repeats and is shorter, such as a heading, is not text that two parts share
FIRST_ROWS = 100  # one of which has a value in the column that is read
READABLE = f"{', '.join(FORMATS)}, also with {', '.join(COMPRESSIONS)}"
Piece = tuple[Path, int, str]  # text, with the file and the row that it is from


@dataclass(kw_only=True)
class Files(TextSource):
    """Text files on this machine.

    Attributes:
        paths: Files, folders, or patterns such as `notes/*.txt`. Their order is the order of the text.
        field: The column that holds the text, or messages (lit_recon.data.documents), in files that have columns.
        evaluation_paths: Files for the evaluation part alone.
    """

    paths: str | Sequence[str]
    field: str = "text"
    evaluation_paths: str | Sequence[str] | None = None

    def documents(self, part: Part) -> Iterator[str]:
        """Documents of a part: what each row or file without rows has in it."""
        if part == "evaluation" and self.evaluation_paths is not None:
            pieces: Iterable[Piece] = self._pieces(self.evaluation_paths)
        else:
            pieces = itertools.compress(self._pieces(self.paths), (found == part for found in self._parts))
        for _, of_document in itertools.groupby(pieces, key=lambda piece: piece[:2]):
            yield from joined((text for *_, text in of_document), "")

    def describe(self, part: Part) -> str:
        """Name of the file; with several files, the first name and the number of the others."""
        own = self.evaluation_paths if part == "evaluation" else None
        names = [path.name.encode(errors="replace").decode() for path in _found(self.paths if own is None else own)]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

    def text_files(self) -> list[Path]:
        """The files that paths, folders and patterns name."""
        return [*_found(self.paths), *([] if self.evaluation_paths is None else _found(self.evaluation_paths))]

    def _problems(self) -> list[str]:
        problems = super()._problems()
        files, wrong = _find(self.paths)
        problems += [f"data.paths: {problem}" for problem in [*wrong, *self._unreadable(files)]]
        if self.evaluation_paths is not None:
            others, wrong = _find(self.evaluation_paths)
            problems += [f"data.evaluation_paths: {problem}" for problem in [*wrong, *self._unreadable(others)]]
            there = {path.resolve() for path in others}
            if both := [str(path) for path in files if path.resolve() in there]:
                problems.append(f"data.paths and data.evaluation_paths share {', '.join(both)}; name it in one of them")
        return problems

    def _unreadable(self, files: Iterable[Path]) -> Iterator[str]:
        """What is wrong with files, as far as their first rows tell."""
        for path in files:
            try:
                if next(_documents(path, self.field), None) is None:
                    yield f"{path} is empty; leave it out"
            except ValueError as error:
                yield str(error)

    def _pieces(self, given: str | Sequence[str]) -> Iterator[Piece]:
        """Pieces of the rows and paragraphs of all files, in order."""
        for path in _found(given):
            documents = _documents(path, self.field)
            if is_plain(path):
                yield from ((path, 0, piece) for text in _paragraphs(documents) for piece in cut(text))
            else:
                for row, text in enumerate(documents):
                    yield from ((path, row, piece) for piece in cut(text) if text.strip())

    @cached_property
    def _parts(self) -> list[Part | None]:
        """Part of each piece of `paths`; None for a passage that another part has too.

        Evaluation keeps what it shares with another part, then held-out.
        """
        pieces = [(len(text), _passage(path, text)) for path, _, text in self._pieces(self.paths)]
        parts: list[Part | None] = [*_cut([size for size, _ in pieces], self._ends())]
        taken: set[int | None] = set()
        if self.evaluation_paths is not None:
            taken = {_passage(path, text) for path, _, text in self._pieces(self.evaluation_paths)} - {None}
        for part in ("evaluation", "held_out", "calibration"):
            members = [index for index, found in enumerate(parts) if found == part]
            repeated = [index for index in members if pieces[index][1] in taken]
            taken.update(pieces[index][1] for index in members if pieces[index][1] is not None)
            for index in repeated:
                parts[index] = None
            if repeated:
                log.warning("%d paragraphs of the %s part are left out: another part has them too", len(repeated), part)
        return parts

    def _ends(self) -> dict[Part, float]:
        """End of each part of `paths`, as a share of the characters."""
        if self.evaluation_paths is None:
            return {"calibration": 0.7, "held_out": 0.8, "evaluation": 1.0}
        return {"calibration": 0.9, "held_out": 1.0}


def _cut(sizes: Sequence[int], ends: dict[Part, float]) -> Iterator[Part]:
    """Part of each piece, by the position of its first character."""
    total, start = sum(sizes), 0
    for size in sizes:
        yield next(part for part, end in ends.items() if start < end * total)
        start += size


def _passage(path: Path, text: str) -> int | None:
    """Hash by which paragraphs of plain text are compared; None for short paragraphs, and for rows (see TextSource)."""
    return hash(text) if is_plain(path) and len(text) >= PASSAGE else None


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Paragraphs: runs of lines that together are the whole text, line ends included.

    A run ends with a blank line, or with a line of PASSAGE characters, which is a paragraph of a text without blank
    lines, or when it has WHOLE_CHARACTERS characters.
    """
    run = ""
    for line in lines:
        run += line + "\n"
        if not line.strip() or len(line) >= PASSAGE or len(run) >= WHOLE_CHARACTERS:
            yield run
            run = ""
    if run:
        yield run


def _documents(path: Path, field: str) -> Iterator[str]:
    """Text of each row of a file, or the lines of plain text.

    Raises:
        ValueError: It cannot be read, or has no such column; the message names it.
    """
    try:
        found = rows(path)
        if is_plain(path):
            field = "text"
        else:
            first = list(itertools.islice(found, FIRST_ROWS))
            if first:
                check_field(field, dict.fromkeys(itertools.chain.from_iterable(first)))
            found = itertools.chain(first, found)
        yield from (read_document(row, field) for row in found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _found(given: str | Sequence[str]) -> list[Path]:
    """Files that paths and patterns match; a ValueError with what is wrong."""
    files, problems = _find(given)
    if problems:
        raise ValueError("; ".join(problems))
    return files


def _find(given: str | Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files that paths, folders and patterns name, each once, and what is wrong with the others."""
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, list | tuple) or not all(isinstance(path, str) and path for path in patterns):
        return [], [f"{given!r} names no file; give [a.txt, ...]"]
    files: dict[Path, Path] = {}
    problems = [] if patterns else ["no file is named; give [a.txt, ...]"]
    for pattern in patterns:
        try:
            paths = _expand(pattern)
            if wrong := [path for path in paths if text_format(path) not in FORMATS]:
                raise ValueError(f"{', '.join(map(str, wrong))} is none of {READABLE}")
            for path in paths:
                files.setdefault(path.resolve(), path)
        except (OSError, RuntimeError, ValueError) as error:
            problems.append(str(error))
    return list(files.values()), problems


def _expand(pattern: str) -> list[Path]:
    """Files that a path or pattern names; of folders, those that can be read."""
    given = Path(pattern).expanduser()
    paths = [given] if given.exists() else [Path(path) for path in sorted(glob.glob(str(given), recursive=True))]
    if not paths:
        raise ValueError(f"{pattern} is not there, or matches no file (looked in {Path.cwd()})")
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = (Path(name) for name in sorted(glob.glob(f"{glob.escape(str(path))}/**/*", recursive=True)))
            files += [file for file in found if file.is_file() and text_format(file) in FORMATS]
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path} is a pipe, a device or a link to nothing; give a file")
    if not files:
        raise ValueError(f"{pattern} is a folder without text; expected {READABLE}")
    return files
