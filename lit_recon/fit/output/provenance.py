"""Provenance of a run's inputs, for results.json: hashes of what came from outside, and states of repositories.

    model     commit of the Hub, and sha256 of every file of weights, tokenizer and configuration
    text      sha256 of every file of text; samples: of all tokens that were taken, whatever they come from
    masks     sha256 of what masks were read from
    modules   sha256 of the user's own files of Python
    git       commit and state of the repositories in which those lie, and lit_recon
    code      sha256 of the code of lit_recon
    machine   device, CPU, its instructions, threads and GPU, on which the last bits depend
    seen      size and time of all these files, so that a study need not read them again (changed.py)

The signature of the run has hashed weights, tokens and code already (signature.py); only the rest is read here.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lit_recon
from lit_recon.fit.job import Job
from lit_recon.fit.signature import OURS, code_files, machine, package_hash
from lit_recon.model.loading import HubModel
from lit_recon.pruning.criteria.given import MasksFile, Zeros
from lit_recon.system.atomic_files import sha256
from lit_recon.system.device import cpu_name
from lit_recon.system.git_state import git_state

log = logging.getLogger(__name__)

SMALL = (  # besides the vocabulary files, whose names the tokenizer knows
    *("config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})/")  # of the Hub's cache


def provenance(job: Job, signature: Mapping[str, Any]) -> dict[str, Any]:
    """Where all that a run reads came from, as results.json has it.

    Args:
        job: The run.
        signature: Its signature, with hashes of weights, tokens and code.

    Files that are gone since they were read cost no result: they are null, or missing where nothing names them.
    """
    own = {name: path for name, path in code_files(job.output.config).items() if not name.startswith(OURS)}
    device, first = job.execution.compute.device, job.model.files()[0]
    masks, text, model = _mask_files(job), _text(job), _model(job, first, signature["model"])
    of_model = [first.parent / name for name in model["files"]]
    init = Path(lit_recon.__file__)
    git = {"lit_recon": git_state(init.parent, [init], only_known=True), "modules": _states(own.values())}
    return {
        "model": model,
        "text": text,
        "samples": signature["data"],
        "masks": _hashes(masks),
        "modules": {name: signature["code"].get(name) or sha256(path) for name, path in own.items()},
        "module_files": {name: str(path.absolute()) for name, path in own.items()},
        "git": git,
        "code": package_hash(),
        "machine": {"device": device.type, "CPU": cpu_name()} | machine(device),
        "seen": seen([*of_model, *map(Path, text), *masks, *own.values()]),
    }


def seen(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size in bytes, and time of the last change in nanoseconds, of those files that are there, by absolute path."""
    about = {str(path.absolute()): path.stat() for path in files if path.is_file()}
    return {name: [one.st_size, one.st_mtime_ns] for name, one in about.items()}


def hub_commit(path: Path) -> str | None:
    """The commit that a file of the Hub's cache belongs to; None for another file."""
    found = _SNAPSHOT.search(path.as_posix())
    return found[1] if found else None


def _model(job: Job, first: Path, weights: Mapping[str, str]) -> dict[str, Any]:
    """Commit and hashes of the dense model, by the first file of its weights; the hashes of those are known."""
    names = {*SMALL, *job.tokenizer.vocab_files_names.values()}
    small = (first.parent / name for name in sorted(names - weights.keys()))
    return {
        "name": job.model.describe(),
        "revision": hub_commit(first),
        "files": {**weights, **{path.name: sha256(path) for path in small if path.is_file()}},
    }


def _mask_files(job: Job) -> list[Path]:
    """The files that masks are read from: a file of masks, or the weights of a sparse model."""
    criterion = job.method.pruning.criterion
    if isinstance(criterion, MasksFile):
        return [Path(criterion.path)]
    if isinstance(criterion, Zeros) and criterion.name is not None:
        return HubModel(name=criterion.name).files()
    return []


def _states(files: Iterable[Path]) -> list[dict[str, Any]]:
    """State of each repository in which some of the files lie."""
    in_folder: dict[Path, list[Path]] = {}
    for path in files:
        in_folder.setdefault(path.resolve().parent, []).append(path.resolve())
    states: dict[str, dict[str, Any]] = {}
    for folder, members in in_folder.items():
        if state := git_state(folder, members):
            before = states.setdefault(state["repository"], state)
            before["dirty"] |= state["dirty"]
    return list(states.values())


def _text(job: Job) -> dict[str, str | None]:
    """Hashes of the files of text; `samples` says what was taken of them, also of those that are gone."""
    try:
        return _hashes(job.source.text_files())
    except ValueError as error:  # a pattern that matches no file any more
        log.info("results.json does not say what files the text was in: %s", error)
        return {}


def _hashes(files: Iterable[Path]) -> dict[str, str | None]:
    """SHA-256 of files, by path; null for one that is gone."""
    return {str(path): sha256(path) if path.is_file() else None for path in files}
