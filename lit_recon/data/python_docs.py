"""PythonDocs: the reference of the Python language, which comes with every Python: no download, no account.

`pydoc_data.topics` holds what `help("TOPIC")` shows: eighty texts, half a megabyte. Each topic belongs to one part.
Many topics are excerpts of others (`try` is a section of `compound`): excerpts are left out, and topics that share text
go to the same part.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lit_recon.data.source import Part, TextSource

SHARES: dict[Part, float] = {"calibration": 0.6, "held_out": 0.1, "evaluation": 0.3}
LONG_LINE = 60  # characters; the texts are wrapped at 70 to 80, and two texts may share a shorter line by chance


@dataclass(kw_only=True)
class PythonDocs(TextSource):
    """Help texts of the running Python; they differ a little from version to version."""

    def documents(self, part: Part) -> Iterable[str]:
        """Texts of the part's topics, in alphabetical order of the topics."""
        topics = _topics()
        return [topics[name] for name in sorted(divide(topics)[part])]

    def describe(self, part: Part) -> str:
        """Name with the version of Python, on which the texts depend."""
        return f"python_docs {sys.version_info.major}.{sys.version_info.minor}"

    def _problems(self) -> list[str]:
        problems = super()._problems()
        try:
            _topics()
        except ImportError as error:  # some distributions of Python leave it out
            problems.append(f"this Python comes without help texts ({error}); use data=files data.paths=[...]")
        return problems


def divide(topics: Mapping[str, str]) -> dict[Part, list[str]]:
    """Deal the topics out to the parts, as near to SHARES of the text as possible.

    1. Leave out each topic if larger topics contain all its long lines.
    2. Join topics that have a long line in common into groups.
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
    """Groups of topics that share long lines, without excerpts of others."""
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
    """Text of each topic; an ImportError where Python lacks them."""
    from pydoc_data.topics import topics  # not at the top: it may be missing

    return topics
