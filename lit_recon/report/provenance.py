"""Where a run came from, as its page shows it: hashes of its files, states of repositories, machine and versions.

Read leniently: an earlier version recorded less, and what is of another kind than expected is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SHORT = 12  # letters of a hash that people compare
MOST = 24  # files of a kind that are named


class Fact(NamedTuple):
    """A line: what it is about, what people read, and the whole of it."""

    label: str
    text: str
    whole: str = ""


def provenance_facts(results: Mapping[str, Any]) -> dict[str, list[Fact]]:
    """Facts on where a run came from, by what they are about; only what is known.

    Args:
        results: Content of results.json.
    """
    found = _mapping(results, "provenance")
    model, git = _mapping(found, "model"), _mapping(found, "git")
    facts = {
        "Model": [*_texts(model, "name", "revision"), *_hashes(_mapping(model, "files"))],
        "Text": [*_hashes(_mapping(found, "text")), *_hashes({"all samples": found.get("samples")})],
        "Masks": _hashes(_mapping(found, "masks")),
        "Your modules": [*_hashes(_mapping(found, "modules")), *_repositories(git.get("modules"))],
        "lit_recon": [*_repositories([git.get("lit_recon")]), *_hashes({"code": found.get("code")})],
        "Machine": _texts(_mapping(found, "machine")),
        "Versions": _texts(_mapping(results, "versions")),
    }
    return {about: lines for about, lines in facts.items() if lines}


def _texts(of: Mapping[str, Any], *names: str) -> list[Fact]:
    """Entries that are texts or numbers, all or those of some names."""
    known = {name: of.get(name) for name in names or of}
    return [Fact(str(name), str(value)) for name, value in known.items() if isinstance(value, (str, int, float))]


def _hashes(of: Mapping[str, Any]) -> list[Fact]:
    """Hashes by file, shortened; a file that was gone when it was looked for says so."""
    known = [(name, value) for name, value in of.items() if value is None or isinstance(value, str)]
    known = [] if all(value is None for _, value in known) else known
    lines = [Fact(name, value[:SHORT] if value else "gone", value or "") for name, value in known[:MOST]]
    more = [Fact("more files", f"{len(known) - MOST:,}, in results.json")] if len(known) > MOST else []
    return lines + more


def _repositories(states: Any) -> list[Fact]:
    """Repositories with their commits, and whether files differed from those."""
    found = [state for state in states if isinstance(state, dict)] if isinstance(states, Sequence) else []
    lines = []
    for state in found:
        commit = state.get("commit")
        text = commit[:SHORT] if isinstance(commit, str) else "without a commit"
        whole = commit if isinstance(commit, str) else ""
        lines.append(
            Fact(f"git, {state.get('repository')}", f"{text}{', with changes' if state.get('dirty') else ''}", whole)
        )
    return lines


def _mapping(of: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An entry that is a mapping; empty where it is something else."""
    found = of.get(name)
    return found if isinstance(found, dict) else {}
