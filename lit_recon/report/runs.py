"""Folders of runs in any state, and what is known of each: a sweep has finished, running, failed and damaged ones.

A run that is not finished is listed with what its config.yaml says, and a folder that no run has made, or a record of
its own, with its evaluations; what cannot be shown is one message, and never in
the way of other runs.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_recon.report.evaluations import Evaluation, is_record, latest, protocol_text, read_evaluations
from lit_recon.report.run_files import is_study_figure, read_results
from lit_recon.system.lock import is_held

FINISHED, RUNNING, UNFINISHED, FAILED, DAMAGED = "finished", "running", "unfinished", "failed", "damaged"
EVALUATED = "evaluated"  # a checkpoint of another tool: only what lit_recon.evaluate found
NONE = "no run"  # an empty folder, a folder of something else, nothing at all
OVERVIEW = ("report.html", "runs.csv")  # of a folder with the page over many runs, which runs/* matches as well


@dataclass(frozen=True)
class Run:
    """What the files of one folder say.

    Attributes:
        folder: The folder, as it was given.
        state: One of the states above.
        message: What is to be said about a run that is not finished; empty for one that is.
        results: results.json of a finished run, else None.
        config: config.yaml by dotted keys, such as "module.optimizer.lr"; empty where it cannot be read.
        evaluations: What evaluations.json has, the oldest first.
        remarks: What could not be read besides.
    """

    folder: Path
    state: str
    message: str = ""
    results: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    evaluations: tuple[Evaluation, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def page(self) -> Path:
        """The file of its page: in its folder, of a record in the folder that is called like it."""
        return (self.folder.with_suffix("") if is_record(self.folder) else self.folder) / "report.html"

    @property
    def shown(self) -> Path:
        """What its page shows: the folder of a run, or the record of a checkpoint that was only evaluated."""
        return self.folder / "evaluations.json" if self.state == EVALUATED and self.folder.is_dir() else self.folder

    @property
    def is_expected(self) -> bool:
        """Whether nothing is wrong with it: it is finished, still running, or only evaluated."""
        return self.state in (FINISHED, RUNNING, EVALUATED)


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Runs in folders, each once; figures of studies and earlier pages, which `runs/*/*` matches too, are left out.

    They are not where nothing else was given.
    """
    once = list({folder.absolute(): folder for folder in folders}.values())
    apart = [is_study_figure(folder) or is_page(folder) or is_overview(folder.parent) for folder in once]
    meant = [folder for folder, is_apart in zip(once, apart, strict=True) if not is_apart]
    return [read_run(folder) for folder in meant or once]


def is_page(folder: Path) -> bool:
    """Whether a folder holds a page alone: that over many runs, or that of the record next to it."""
    return is_overview(folder) or is_record(folder.with_name(f"{folder.name}.json"))


def is_overview(folder: Path) -> bool:
    """Whether a folder holds the page over many runs and no run."""
    return all((folder / name).is_file() for name in OVERVIEW) and not (folder / "config.yaml").exists()


def read_run(folder: Path) -> Run:
    """A run in any state; nothing is raised for what a folder may hold."""
    config, config_remark = _read_config(folder)
    evaluations, evaluation_remarks = read_evaluations(folder)
    known: dict[str, Any] = {"config": config, "evaluations": evaluations}
    known["remarks"] = (*filter(None, [config_remark]), *evaluation_remarks)
    if folder.is_dir() and is_held(folder):
        return Run(folder, RUNNING, f"{folder}: this run is in progress; its report comes when it ends.", **known)
    is_cleared = (folder / "config.next.yaml").is_file()  # what is left there is of an earlier run
    if is_cleared or ((folder / "config.yaml").is_file() and not (folder / "results.json").is_file()):
        return Run(folder, *_unfinished(folder), **known)
    try:
        return Run(folder, FINISHED, results=read_results(folder), **known)
    except ValueError as error:
        if (folder / "results.json").is_file():
            return Run(folder, DAMAGED, _line(error), **known)
        if evaluations or evaluation_remarks:  # what cannot be read of them is a remark
            return Run(folder, EVALUATED if evaluations else DAMAGED, **known)
        return Run(folder, NONE, _line(error), **known)


def _unfinished(folder: Path) -> tuple[str, str]:
    """State of a run that left no results, and what there is to say."""
    if (folder / "commits.begun").is_file() or (folder / "config.next.yaml").is_file():
        return UNFINISHED, f"{folder}: no results of this run here; it was stopped, resume={folder} goes on with it."
    return FAILED, f"{folder}: no results of this run here; it ended before its first window was done."


def _read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """config.yaml by dotted keys, and a remark where it cannot be read."""
    import yaml  # not for --help

    path = folder / "config.yaml"
    if not path.is_file():
        return {}, ""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
        return dict(_flat(config if isinstance(config, dict) else {})), ""
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        return {}, f"{path}: cannot be read ({_line(error)}); the run is shown without its settings."


def _flat(config: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted keys; lists are values."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def protocol_of(run: Run) -> str:
    """What the perplexities of a run, or the newest of a checkpoint that was only evaluated, are measured on."""
    if run.results is not None:
        return protocol_text(run.results["protocol"])
    found = latest(run.evaluations, "perplexity") if run.state == EVALUATED else None
    return protocol_text(found["protocol"]) if found else ""


def as_setting(value: Any) -> str:
    """A value of config.yaml as text: "null", "true", 0.0005, a list as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _line(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())
