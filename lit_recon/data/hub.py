"""Hub: data sets of the Hugging Face Hub, or folders in the Hub's layout, read by `datasets`.

By default a split is streamed: only its start is downloaded, as far as samples need it. All parts may come from one
split, whose documents are then dealt out in turn, or evaluation has a split or a data set of its own.
"""

import dataclasses
import io
import itertools
import logging
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow.json
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from lit_recon.data.documents import DOCUMENT_CHARACTERS, check_field, cut, joined, read_document
from lit_recon.data.source import Part, TextSource
from lit_recon.system.cache import usable_folder

# The readers of `datasets` log an error before they raise it; the exception's text is enough.
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)

DEEPEST = 1000  # levels of JSON: pyarrow recurses in threads, and where their stacks end, the process does
BLOCK_CHARACTERS = 20_000  # joined rows that go to one part together: enough for context, few enough for fair shares
# The part that gets each next document, over and over, when one split serves all parts; spread, for short splits.
TURNS: tuple[Part, ...] = (
    *("calibration", "calibration", "calibration", "evaluation", "calibration"),
    *("calibration", "held_out", "calibration", "evaluation", "calibration"),
)
_SHARED = {field.name for field in dataclasses.fields(TextSource)} | {"evaluation"}  # not settings of one split
ALTERNATIVE = "or use text on this machine: data=files data.paths=[...]"


@dataclass(kw_only=True)
class Hub(TextSource):
    """A data set of the Hub, or a folder with the same layout.

    One split may serve all parts: of every ten documents seven are for calibration, one is held out and two are for
    evaluation; fewer than ten documents are cut into pieces first. With `evaluation`, all nine others are for
    calibration.

    Attributes:
        name: Hub id or folder.
        config: The data set's configuration, where it has several.
        split: Name of the split.
        field: Name of the rows' text, or of their messages (lit_recon.data.documents).
        data_files: Files of the data set to read instead of all of them.
        separator: What stands between rows that continue each other, such as the lines of WikiText; None: each row is
            a document of its own.
        streaming: Read rows as they are needed. False downloads the split once and keeps it, also for use without
            network.
        evaluation: The settings above that differ for the evaluation part, such as {split: test}; None takes it from
            the same split.
    """

    name: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    data_files: str | Iterable[str] | None = None
    separator: str | None = None
    streaming: bool = True
    evaluation: Mapping[str, Any] | None = None

    def documents(self, part: Part) -> Iterator[str]:
        """Documents of a part: those dealt out to it, or the whole split that evaluation has for itself."""
        if part == "evaluation" and self.evaluation:
            return self._evaluation.all_documents(DOCUMENT_CHARACTERS)
        turns = TURNS
        if self.evaluation:
            turns = tuple("held_out" if turn == "held_out" else "calibration" for turn in TURNS)
        documents = _enough(self.all_documents(BLOCK_CHARACTERS))
        return (text for turn, text in zip(itertools.cycle(turns), documents, strict=False) if turn == part)

    def all_documents(self, at_most: int) -> Iterator[str]:
        """All documents of the split: rows that are not blank, or with a separator all rows, joined.

        Args:
            at_most: Characters, about, of a document that rows are joined to.
        """
        if self.separator is None:
            return (text for text in self._rows() if text.strip())
        return joined(self._rows(), self.separator, at_most=at_most)

    def describe(self, part: Part) -> str:
        """Name, configuration and split that the part is taken from."""
        source = self._evaluation if part == "evaluation" and self.evaluation else self
        return " ".join(word for word in (source.name, source.config, source.split) if word)

    def split_name(self, part: Part) -> str:
        """The split that evaluation, or all other parts, have for themselves; else which part of the split it is."""
        if not self.evaluation:
            return f"{part} part of {self.split}"
        return self._evaluation.split if part == "evaluation" else f"{part} part of {self.split}"

    def is_one_text(self, part: Part) -> bool:
        """Whether rows are joined, as papers join those of WikiText."""
        source = self._evaluation if part == "evaluation" and self.evaluation else self
        return source.separator is not None

    def hub_datasets(self) -> list[str]:
        """Its id, where it is no folder."""
        return [] if Path(self.name).expanduser().is_dir() else [self.name]

    def check(self) -> None:
        """Find what is wrong with the settings, then read the first row of each split.

        Raises:
            ValueError: With what is wrong, and what to do about it.
        """
        super().check()
        for source in (self, self._evaluation) if self.evaluation else (self,):
            if next(source._rows(), None) is None:
                raise ValueError(f"data set {source.describe('calibration')} has no rows")

    def _problems(self) -> list[str]:
        problems = super()._problems()
        own = [field.name for field in dataclasses.fields(self) if field.name not in _SHARED]
        unknown = [str(key) for key in self.evaluation or {} if key not in own]
        if unknown:
            problems.append(f"data.evaluation has {', '.join(unknown)}; it may have {', '.join(own)}")
        for name in dict.fromkeys((self.name, (self.evaluation or {}).get("name", self.name))):
            try:
                if not Path(name).expanduser().is_dir():
                    validate_repo_id(name)
            except hub_errors.HFValidationError:
                problems.append(f"data.name={name!r} is neither a folder here nor a Hub id ('owner/name')")
        return problems

    def _rows(self) -> Iterator[str]:
        return read_rows(lambda: self._dataset, self.field, origin=f"data set {self.describe('calibration')}")

    @cached_property
    def _evaluation(self) -> "Hub":
        return dataclasses.replace(self, **{"evaluation": None, **(self.evaluation or {})})

    @cached_property
    def _dataset(self) -> Any:
        folder = Path(self.name).expanduser()
        cache = usable_folder(  # needed to stream, too
            Path(datasets.config.HF_DATASETS_CACHE), written=True, remedy="set HF_HOME to a folder that can be written"
        )
        arguments: dict[str, Any] = {"split": self.split, "streaming": self.streaming, "cache_dir": str(cache)}
        if self.data_files is not None:
            arguments["data_files"] = self.data_files if isinstance(self.data_files, str) else list(self.data_files)
            arguments["verification_mode"] = "no_checks"  # the sizes it would check are those of all files
        if folder.is_dir():
            return load_dataset(str(folder), self.config, **arguments)
        if self.streaming:  # fails at once where load_dataset fails after half a minute of attempts
            HfApi().repo_info(self.name, repo_type="dataset", timeout=10)
        return load_dataset(self.name, self.config, **arguments)


def read_rows(load: Callable[[], Iterable[Mapping[str, Any]]], field: str, *, origin: str) -> Iterator[str]:
    """Text of each row of a data set; empty where a row has none.

    Args:
        load: Opens the data set.
        field: Name of the rows' text, or of their messages (lit_recon.data.documents).
        origin: What the data set is called in messages.

    Raises:
        ValueError: The data set cannot be reached or read, or has no such field.
    """
    try:
        for row in _without_deep_json(load):
            check_field(field, row)
            yield read_document(row, field)
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError, hub_errors.HTTPError) as error:
        raise ValueError(f"{origin}: {_explanation(error)}") from error


def _without_deep_json(load: Callable[[], Iterable[Mapping[str, Any]]]) -> Iterator[Mapping[str, Any]]:
    """Rows of a data set; a ValueError where JSON is nested so deeply that to read it would end the process."""
    left = None
    while True:
        try:
            with _shallow_json():
                left = left or iter(load())
                row = next(left)
        except StopIteration:  # which `datasets` also raises where the first file is empty
            return
        yield row


@contextmanager
def _shallow_json() -> Iterator[None]:
    """A context in which pyarrow refuses JSON of more than DEEPEST levels."""
    read = pyarrow.json.read_json

    def read_shallow(file: Any, *arguments: Any, **settings: Any) -> Any:
        if isinstance(file, io.BytesIO) and _levels(file.getbuffer()) > DEEPEST:  # as `datasets` calls it
            raise ValueError("its JSON is nested too deeply")
        return read(file, *arguments, **settings)

    pyarrow.json.read_json = read_shallow
    try:
        yield
    finally:
        pyarrow.json.read_json = read


def _levels(content: memoryview) -> int:
    """Levels of some JSON: its brackets that are open at the same time, but for those within texts."""
    steps = numpy.zeros(256, numpy.int32)
    steps[[*b"[{"]], steps[[*b"]}"]] = 1, -1
    bare = re.sub(rb'"[^"\\]*(?:\\.[^"\\]*)*"', b"", content, flags=re.DOTALL)
    return int(steps[numpy.frombuffer(bare, numpy.uint8)].cumsum().max(initial=0))


def _enough(documents: Iterator[str]) -> Iterator[str]:
    """Documents to deal out; where there are fewer than turns, such as one giant row, in pieces."""
    first = list(itertools.islice(documents, len(TURNS)))
    if len(first) == len(TURNS):
        return itertools.chain(first, documents)
    at_most = sum(map(len, first)) // (2 * len(TURNS))
    return itertools.chain.from_iterable(joined(cut(text), "", at_most=at_most) for text in first)


def _explanation(error: Exception) -> str:
    """Message for an error of `datasets` or the Hub, on one line."""
    text = textwrap.shorten(str(error), 500)
    if isinstance(error, (hub_errors.RepositoryNotFoundError, DatasetNotFoundError)):
        return (
            "neither a folder here nor a data set that the Hub shows you; if it is private or needs approval, log in "
            f"with hf auth login, {ALTERNATIVE}"
        )
    answered = isinstance(error, hub_errors.HfHubHTTPError)
    if isinstance(error, (ConnectionError, hub_errors.HTTPError)) and not answered:
        return f"the Hub cannot be reached ({text}); check the network, HF_HUB_OFFLINE and HF_ENDPOINT, {ALTERNATIVE}"
    return text
