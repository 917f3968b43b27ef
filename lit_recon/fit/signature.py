"""Signature of a run: what a resumed run must share with it, configuration, model, data and code."""

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object

from lit_recon import __version__
from lit_recon.fit.job import Job
from lit_recon.model.mapped_files import sampled_hash

# Settings of how a run is carried out, which may differ when it is resumed.
OF_ONE_CALL = ("overwrite", "plan", "resume", "stop_after")  # not kept from the call before
OF_THE_CALL = (*OF_ONE_CALL, "output_dir", "memory_limit")
_LIBRARIES = ("torch", "lightning", "transformers")


def signature(job: Job) -> dict[str, Any]:
    """The signature of a run whose model has been loaded."""
    samples = job.samples
    tokens = hashlib.sha256()
    for tokens_ST in (samples.calibration_ST, samples.held_out_ST, samples.evaluation_ST):
        tokens.update(str(tuple(tokens_ST.shape)).encode() + tokens_ST.to(torch.int64).numpy().tobytes())
    return {
        "config": {key: value for key, value in job.output.config.items() if key not in OF_THE_CALL},
        "model": sampled_hash(job.model.files()),
        "model_config": json.loads(job.model.config().to_json_string(use_diff=False)),
        "data": tokens.hexdigest(),
        "compute": {"device": job.execution.compute.device.type, "precision": job.execution.compute.precision},
        "code": _code(job.output.config),
        "versions": {"lit_recon": __version__} | {name: version(name) for name in _LIBRARIES},
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two signatures, each in words."""
    found = [
        f"{key} was {old!r} and is {new!r}"
        for part in ("config", "compute")
        for key, old, new in differences(before[part], now[part])
    ]
    if before["model"] != now["model"]:
        found.append("the files of the dense model are not the same")
    found += [
        f"the dense model's config.json: {key} was {old!r} and is {new!r}"
        for key, old, new in differences(before["model_config"], now["model_config"])
    ]
    if before["data"] != now["data"]:
        found.append("the text gives other samples")
    found += [
        f"the file of {name} has changed"
        for name, old in sorted(before.get("code", {}).items())
        if now["code"].get(name) != old
    ]
    for name, old in before["versions"].items():
        if now["versions"].get(name) != old:
            found.append(f"{name} was {old} and is {now['versions'].get(name)}")
    return found


def _code(config: Mapping[str, Any]) -> dict[str, str]:
    """The classes that a configuration names, except those of installed packages, with a hash of their files."""
    found: dict[str, str] = {}
    for key, value in config.items():
        for node in value if isinstance(value, (list, tuple)) else [value]:
            found |= _code(node) if isinstance(node, Mapping) else {}
        if key == "_target_" and isinstance(value, str) and not value.startswith("lit_recon."):
            path = _source(value)
            if path and "site-packages" not in Path(path).parts:
                found[value] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return found


def _source(target: str) -> str | None:
    """The file of what a dotted path names: of its definition, or of the module where an instance stands."""
    try:
        return inspect.getsourcefile(get_object(target))
    except TypeError:
        return getattr(sys.modules.get(target.rpartition(".")[0]), "__file__", None)


def differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of every setting that differs between two configurations."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in sorted({*before, *now}, key=str):
            below = f"{key}.{name}" if key else str(name)
            yield from differences(before.get(name), now.get(name), below)
    elif before != now:
        yield key, before, now
