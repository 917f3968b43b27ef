"""What has changed since a run was finished: its inputs, which make it another run, and the code that it was made by.

A study asks this of each run that is done, before it starts: no model is loaded, nothing is fetched, and a file is only
read again where its size is the same and its time is not. What results.json does not say is not compared.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from hydra.utils import instantiate

from lit_recon.fit.output.provenance import SMALL, seen
from lit_recon.fit.signature import LIBRARIES, listed, package_hash
from lit_recon.settings.values import targets
from lit_recon.system.atomic_files import sha256
from lit_recon.system.versions import versions

_OF_THE_HUB = "lit_recon.model.loading.HubModel"
_BLOB = re.compile(r"[0-9a-f]{64}")  # the Hub's cache names large files by their SHA-256


def read_origin(run: Path) -> dict[str, Any]:
    """Where a finished run came from: `provenance` of results.json, with `versions`; empty where it does not say."""
    try:
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    results = results if isinstance(results, dict) else {}
    return _mapping(results, "provenance") | {"versions": _mapping(results, "versions")}


def changed_inputs(origin: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What of a run's inputs is not as it was, in words; empty where all that can be compared is the same.

    Args:
        origin: Where the run came from.
        config: The configuration that is asked for now, with "~" expanded.
    """
    kinds = {
        "files of the dense model": _of_model(origin, config.get("model")),
        "files of text": _of_text(origin, config.get("data")),
        "masks": ((Path(name), hashed) for name, hashed in _hashes(origin, "masks").items() if Path(name).is_file()),
    }
    said = []
    for kind, files in kinds.items():
        if other := [path.name for path, hashed in files if not _is_same(path, hashed, _mapping(origin, "seen"))]:
            said.append(f"{kind} are not the same ({listed(other)})")
    return said


def other_code(origin: Mapping[str, Any]) -> str:
    """The versions and code that a run was made by, where they are not those of today, in words; else empty."""
    now, then = _versions(), _hashes(origin, "versions")
    said = [f"{name} {then[name]}" for name in ("lit_recon", *LIBRARIES) if then.get(name, now[name]) != now[name]]
    if not said and origin.get("code", package_hash()) != package_hash():
        said.append("other code of lit_recon")
    files = {name: Path(path) for name, path in _hashes(origin, "module_files").items() if Path(path).is_file()}
    own = {name: hashed for name, hashed in _hashes(origin, "modules").items() if name in files}
    changed = [name for name in own if not _is_same(files[name], own[name], _mapping(origin, "seen"))]
    return ", ".join(said + ([f"other code ({listed(changed)})"] if changed else []))


def _of_model(origin: Mapping[str, Any], node: Any) -> Iterator[tuple[Path, str | None]]:
    """Files of the model that a configuration names, each with its hash in the run; None: the run had none.

    Of a model of the Hub, those in its cache. Models from wheels have their hashes in the configuration.
    """
    if not isinstance(node, Mapping) or node.get("_target_") != _OF_THE_HUB:
        return
    hashes, name = _hashes(_mapping(origin, "model"), "files"), str(node.get("name"))
    folder = Path(name)
    for file in sorted({*hashes, *SMALL}) if hashes else ():
        if folder.is_dir():
            if file in hashes or (folder / file).is_file():
                yield folder / file, hashes.get(file)
        elif file in hashes and isinstance(path := _cached(name, file, node.get("revision")), str):
            yield Path(path), hashes[file]


def _cached(name: str, file: str, revision: Any) -> Any:
    """Path of a file in the Hub's cache; something else where it is not there."""
    try:
        return try_to_load_from_cache(name, file, revision=revision)
    except ValueError:  # no name of the Hub: a folder that is gone
        return None


def _of_text(origin: Mapping[str, Any], node: Any) -> Iterator[tuple[Path, str | None]]:
    """Files of text that a configuration names, each with its hash in the run; None: the run had none.

    A source of the user's own is not asked, and where nothing matches any more nothing can be compared.
    """
    hashes = _hashes(origin, "text")
    names: Iterable[Path] = (path for path in map(Path, hashes) if path.is_file())
    if hashes and isinstance(node, Mapping) and all(name.startswith("lit_recon.") for _, name in targets(node)):
        try:
            names = {*map(Path, hashes), *instantiate(node, _convert_="all").text_files()}
        except Exception:  # whatever is wrong with it; what would run says it
            names = []
    for path in sorted(names):
        yield path, hashes.get(str(path))


def _is_same(path: Path, hashed: str | None, then: Mapping[str, Any]) -> bool:
    """Whether a file is as it was: by its size and time, or by its hash where the size is the same."""
    if hashed is None or not path.is_file():
        return False
    name, blob = str(path.absolute()), path.resolve().name
    now, before = seen([path])[name], then.get(name)
    if before == now:
        return True
    if isinstance(before, list) and before[:1] != now[:1]:
        return False
    return (blob if _BLOB.fullmatch(blob) else _hashed(path, *now)) == hashed


@cache
def _versions() -> dict[str, str]:
    """Versions of today; looking for them takes a few milliseconds."""
    return versions()


@cache
def _hashed(path: Path, size: int, time: int) -> str:
    """SHA-256 of a file, once per study while it stays as it is."""
    return sha256(path)


def _mapping(of: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An entry that is a mapping; empty where it is something else."""
    found = of.get(name)
    return dict(found) if isinstance(found, dict) else {}


def _hashes(of: Mapping[str, Any], name: str) -> dict[str, str]:
    """The entries of a mapping that are texts."""
    return {key: value for key, value in _mapping(of, name).items() if isinstance(value, str)}
