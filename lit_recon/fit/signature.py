"""Signature of a run: what a resumed run must share with it, configuration, model, data and code.

And its machine, on which the last bits of its numbers depend: that may differ, and is told.
"""

import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lit_recon
from lit_recon.fit.job import Job
from lit_recon.fit.output.inputs import own_files
from lit_recon.model.loading import LanguageModel
from lit_recon.system.atomic_files import sha256

# Settings of how a run is carried out, which may differ when it is resumed.
OF_ONE_CALL = ("overwrite", "plan", "resume", "stop_after", "push")  # not kept from the call before
OF_THE_CALL = (*OF_ONE_CALL, "output_dir", "memory_limit", "logger")
LIBRARIES = ("torch", "lightning", "transformers")
_INSTRUCTIONS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")  # what may bound them
_PACKAGE = Path(lit_recon.__file__).parent
OURS = "lit_recon/"  # begins the names of the package's own code


def signature(job: Job) -> dict[str, Any]:
    """The signature of a run whose model has been loaded."""
    samples = job.samples
    tokens = hashlib.sha256()
    own_ST = [] if samples.retraining_ST is None else [samples.retraining_ST]
    for tokens_ST in (samples.calibration_ST, samples.held_out_ST, samples.evaluation_ST, *own_ST):
        tokens.update(str(tuple(tokens_ST.shape)).encode() + tokens_ST.to(torch.int64).numpy().tobytes())
    return {
        "config": {key: value for key, value in job.output.config.items() if key not in OF_THE_CALL},
        "model": _files(job.model),
        "model_config": json.loads(job.model.config().to_json_string(use_diff=False)),
        "data": tokens.hexdigest(),
        "compute": {"device": job.execution.compute.device.type, "precision": job.execution.compute.precision},
        "code": {
            name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in code_files(job.output.config).items()
        },
        "versions": {"lit_recon": lit_recon.__version__} | {name: version(name) for name in LIBRARIES},
    }


def measured_by(signature: Mapping[str, Any]) -> dict[str, Any]:
    """What the measurement of a run's dense model depends on, besides its text: the part of a signature."""
    parts = ("model", "model_config", "compute", "code", "versions")
    return {name: signature[name] for name in parts} | {"loaded": signature["config"].get("model")}


def model_signature(model: LanguageModel, device: torch.device) -> str:
    """Hash of what the text depends on that a model generates: its files, configuration, dtype, attention, and device.

    The files of a model of the Hub are fetched.
    """
    decides = {
        "files": _files(model),
        "config": model.config().to_dict(),
        "choices": [model.dtype, model.attention, device.type],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()


def machine(device: torch.device) -> dict[str, str]:
    """What the last bits of a run's numbers depend on besides its signature."""
    found = {
        "instructions of the CPU": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
    }
    return found | {name: os.environ[name] for name in _INSTRUCTIONS if name in os.environ}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two signatures, each in words."""
    found = [
        f"{key} was {old!r} and is {new!r}"
        for part in ("config", "compute")
        for key, old, new in differences(before[part], now[part])
    ]
    changed = [key for key, _, _ in differences(before["model"], now["model"])]
    if changed:
        found.append(f"files of the dense model are not the same ({listed(changed)})")
    found += [
        f"the dense model's config.json: {key} was {old!r} and is {new!r}"
        for key, old, new in differences(before["model_config"], now["model_config"])
    ]
    if before["data"] != now["data"]:
        found.append("the text gives other samples")
    # A module that is not loaded in both was not needed, or what asks for it has changed itself.
    changed = [name for name in sorted({*before["code"]} & {*now["code"]}) if before["code"][name] != now["code"][name]]
    if changed:
        found.append(f"code has changed ({listed(changed)})")
    for name, old in before["versions"].items():
        if now["versions"].get(name) != old:
            found.append(f"{name} was {old} and is {now['versions'].get(name)}")
    return found


def code_files(config: Mapping[str, Any]) -> dict[str, Path]:
    """The files of the code that a run is made of, except installed packages', by the names of their modules."""
    named = own_files(config)
    installed = tuple(
        os.path.join(folder, "")
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
        for folder in {sysconfig.get_path(name), os.path.realpath(sysconfig.get_path(name))}
    )
    loaded = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.endswith(".py") and not file.startswith(installed) and name != "__main__":
            path = Path(file).resolve()  # of the few that are left: it asks the disk for each folder of the path
            installed_elsewhere = {"site-packages", "dist-packages"} & {*path.parts}
            if path.is_file() and not installed_elsewhere and _PACKAGE not in path.parents:
                loaded[name] = path
    return _package_files() | loaded | named


def _package_files() -> dict[str, Path]:
    """The files of lit_recon, except the report's, which computes nothing."""
    return {
        f"{OURS}{path.relative_to(_PACKAGE).as_posix()}": path
        for path in sorted(_PACKAGE.rglob("*.py"))
        if "report" not in path.parts[len(_PACKAGE.parts) :]
    }


@cache
def package_hash() -> str:
    """Hash of the code of lit_recon, as this process found it first."""
    digest = hashlib.sha256()
    for name, path in _package_files().items():
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _files(model: LanguageModel) -> dict[str, str]:
    """Hash of all that each of a model's files holds."""
    return {path.name: sha256(path) for path in model.files()}


def listed(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of every setting that differs between two configurations."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in sorted({*before, *now}, key=str):
            below = f"{key}.{name}" if key else str(name)
            yield from differences(before.get(name), now.get(name), below)
    elif before != now:
        yield key, before, now
