"""Files: text of the user's own in .txt, .jsonl and .parquet files, read by `datasets` in place, without a copy.

A row of a .jsonl or .parquet file is a document. A .txt file is one document in each part, cut between paragraphs.
The text is divided in its order: the first 70% of the characters for calibration, the next 10% held out, the last 20%
for evaluation; or 90% and 10% where evaluation has files of its own.
"""

import glob
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset

from lit_recon.data.hub import joined, read_rows
from lit_recon.data.source import Part, TextSource

log = logging.getLogger(__name__)

# Not load_dataset, which reports each use to the Hub and waits seconds for an answer where there is no network.
FORMATS: dict[str, Callable[..., Any]] = {
    ".txt": Dataset.from_text,
    ".jsonl": Dataset.from_json,
    ".parquet": Dataset.from_parquet,
}
PASSAGE = 200  # characters: what repeats and is shorter, such as a heading, is not text that two parts share
LONGEST_PARAGRAPH = 2000


@dataclass(kw_only=True)
class Files(TextSource):
    """Text files on this machine.

    Attributes:
        paths: Files, or patterns such as `notes/*.txt`. Their order is the order of the text.
        field: The column of .jsonl and .parquet that holds the text.
        evaluation_paths: Files for the evaluation part alone.
    """

    paths: str | Sequence[str]
    field: str = "text"
    evaluation_paths: str | Sequence[str] | None = None

    def documents(self, part: Part) -> Iterator[str]:
        """Documents of a part: rows, and the paragraphs of each .txt file that are in the part."""
        if part == "evaluation" and self.evaluation_paths is not None:
            pieces: Iterable[tuple[Path, str]] = self._pieces(self.evaluation_paths)
        else:
            pieces = itertools.compress(self._pieces(self.paths), (found == part for found in self._parts))
        for path, of_file in itertools.groupby(pieces, key=lambda piece: piece[0]):
            texts = (text for _, text in of_file)
            yield from joined(texts, "") if path.suffix == ".txt" else texts

    def describe(self, part: Part) -> str:
        """Name of the file; with several files, the first name and the number of the others."""
        own = self.evaluation_paths if part == "evaluation" else None
        names = [path.name for path in _found(self.paths if own is None else own)]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

    def _problems(self) -> list[str]:
        problems = super()._problems()
        files: dict[str, list[Path]] = {}
        for setting in ("paths", "evaluation_paths"):
            given = getattr(self, setting)
            files[setting], wrong = _find(given) if given is not None else ([], [])
            problems += [f"data.{setting}: {problem}" for problem in wrong]
        both = [str(path) for path in files["paths"] if path in files["evaluation_paths"]]
        if both:
            problems.append(f"data.paths and data.evaluation_paths share {', '.join(both)}; name it in one of them")
        for path in itertools.chain(*files.values()):
            try:
                if next(_rows(path, self.field), None) is None:
                    problems.append(f"{path} is empty")
            except ValueError as error:
                problems.append(str(error))
        return problems

    def _pieces(self, given: str | Sequence[str]) -> Iterator[tuple[Path, str]]:
        """Rows and paragraphs of all files, in order, each with its file."""
        for path in _found(given):
            rows = _rows(path, self.field)
            for text in _paragraphs(rows) if path.suffix == ".txt" else filter(str.strip, rows):
                yield path, text

    @cached_property
    def _parts(self) -> list[Part | None]:
        """Part of each piece of `paths`; None for a passage that another part has too.

        Evaluation keeps what it shares with another part, then held-out.
        """
        pieces = [(len(text), _passage(path, text)) for path, text in self._pieces(self.paths)]
        parts: list[Part | None] = [*_cut([size for size, _ in pieces], self._ends())]
        taken: set[int | None] = set()
        if self.evaluation_paths is not None:
            taken = {_passage(path, text) for path, text in self._pieces(self.evaluation_paths)} - {None}
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
    """Hash by which paragraphs of .txt files are compared; None for short paragraphs, and for rows (see TextSource)."""
    return hash(text) if path.suffix == ".txt" and len(text) >= PASSAGE else None


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Paragraphs: runs of lines that together are the whole text, line ends included.

    A run ends with a blank line, or with a line of PASSAGE characters, which is a paragraph of a text without blank
    lines, or when it has LONGEST_PARAGRAPH characters.
    """
    run = ""
    for line in lines:
        run += line + "\n"
        if not line.strip() or len(line) >= PASSAGE or len(run) >= LONGEST_PARAGRAPH:
            yield run
            run = ""
    if run:
        yield run


def _rows(path: Path, field: str) -> Iterator[str]:
    """Texts of a file's rows, or the lines of a .txt file."""

    def load() -> Iterable[dict]:
        # from_text and the others read paths as patterns; without streaming they would keep a copy of the file.
        return FORMATS[path.suffix](glob.escape(str(path)), split="train", streaming=True)

    return read_rows(load, "text" if path.suffix == ".txt" else field, origin=str(path))


def _found(given: str | Sequence[str]) -> list[Path]:
    """Files that paths and patterns match; a ValueError with what is wrong."""
    files, problems = _find(given)
    if problems:
        raise ValueError("; ".join(problems))
    return files


def _find(given: str | Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files that paths and patterns match, each once, and what is wrong with the other paths."""
    files: dict[Path, None] = {}
    problems = []
    patterns = [given] if isinstance(given, str) else list(given)
    if not patterns:
        problems.append("no file is named; give [a.txt, ...]")
    for pattern in patterns:
        plain = Path(pattern).expanduser()
        paths = [plain] if plain.exists() else [Path(path) for path in sorted(glob.glob(str(plain), recursive=True))]
        if not paths:
            problems.append(f"{pattern} is not there, or matches no file (looked in {Path.cwd()})")
        for path in paths:
            if path.is_dir():
                problems.append(f"{path} is a folder; name its files, for example {path}/*.txt")
            elif path.suffix not in FORMATS:
                problems.append(f"{path} is none of {', '.join(FORMATS)}")
            else:
                files[path] = None
    return list(files), problems
