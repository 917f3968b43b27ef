"""The reference of the Python language, which comes with every Python: no download, no account.

`pydoc_data.topics` holds what `help("TOPIC")` shows: eighty texts, half a megabyte. They are split by topic. Many
are excerpts of others (`try` is a section of `compound`), so that excerpts are left out, and topics that share text
go to the same part.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lit_recon.data.source import Part, TextSource

SHARES: dict[Part, float] = {"calibration": 0.6, "held_out": 0.1, "evaluation": 0.3}
LONG_LINE = 60  # characters; the texts are wrapped at 70 to 80, and a shorter line may well stand in two by chance


@dataclass(kw_only=True)
class PythonDocs(TextSource):
    """Help texts of the running Python; they differ a little from version to version."""

    def documents(self, part: Part) -> Iterable[str]:
        """The texts of the part's topics, in alphabetical order of the topics."""
        topics = _topics()
        return [topics[name] for name in sorted(divide(topics)[part])]

    def describe(self, part: Part) -> str:
        """With Python's version, on which the texts depend."""
        return f"python_docs {sys.version_info.major}.{sys.version_info.minor}"

    def _problems(self) -> list[str]:
        problems = super()._problems()
        try:
            _topics()
        except ImportError as error:  # some distributions of Python leave it out
            problems.append(f"this Python comes without help texts ({error}); use data=files data.paths=[...]")
        return problems


def divide(topics: Mapping[str, str]) -> dict[Part, list[str]]:
    """Deal the topics out to the parts, as near to SHARES of the text as goes.

    1. Leave out each topic all of whose long lines stand in larger topics.
    2. Join the topics that have a long line in common to groups.
    3. Give each group, the largest first, to the part that still lacks most.

    Args:
        topics: Text of each topic.

    Returns:
        Names of the topics of each part.
    """
    groups = _groups(topics)
    sizes = [sum(len(topics[name]) for name in group) for group in groups]
    lacking = {part: share * sum(sizes) for part, share in SHARES.items()}
    parts: dict[Part, list[str]] = {part: [] for part in SHARES}
    for size, group in sorted(zip(sizes, groups, strict=True), key=lambda pair: (-pair[0], pair[1])):
        neediest = max(lacking, key=lambda part: lacking[part])
        parts[neediest] += group
        lacking[neediest] -= size
    return parts


def _groups(topics: Mapping[str, str]) -> list[list[str]]:
    """Topics that share long lines, together; excerpts of others left out."""
    groups: list[tuple[list[str], set[str]]] = []  # the names, and the long lines of all of them
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        lines = {line.strip() for line in topics[name].splitlines() if len(line.strip()) >= LONG_LINE}
        related = [group for group in groups if group[1] & lines]
        if related and lines <= set().union(*(group[1] for group in related)):
            continue
        groups = [group for group in groups if group not in related]
        groups.append(
            (
                [name, *(other for group in related for other in group[0])],
                lines.union(*(group[1] for group in related)),
            )
        )
    return [sorted(names) for names, _ in groups]


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics  # here, since it may be missing

    return topics
