"""Study: the runs of a sweep, of which those that are done are skipped and those that were interrupted are resumed.

What is done is read off the folders: a run is the same as one of before if its config.yaml is, but for what belongs to
a call, and the files of its model and text are. Other code or versions are told of; the run stays done. Before the
first run starts it is said how many there are and how long they take,

    seconds of a run = (start and load + its plan's prediction) * (measured / so predicted, of those that are finished),

and the command ends with the report of all. Given again, it continues where it was interrupted.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lit_recon.fit.forecast import Forecast, forecasts
from lit_recon.fit.output.changed import changed_inputs, other_code, read_origin
from lit_recon.fit.output.folder import NEXT_CONFIG
from lit_recon.fit.resume_config import committed
from lit_recon.fit.settings import PATHS
from lit_recon.fit.signature import OF_THE_CALL, differences
from lit_recon.report.run_files import read_results
from lit_recon.settings.sweep import Member, run_apart
from lit_recon.settings.values import expand_home, plain
from lit_recon.system.command_line import as_argument, stop
from lit_recon.system.terminal import say
from lit_recon.system.units import duration

_MAY_DIFFER = (*OF_THE_CALL, "experiment_dir")  # between two calls that mean the same run
_LONGEST = 3  # settings that are named of those by which a folder's run differs


@dataclass(frozen=True)
class Standing:
    """What there is of a run before it is started.

    Attributes:
        kind: "done"; "left", begun and to be resumed; "other", its folder holds a run with other settings; or "new".
        folder: Its output folder, where that is known.
        windows: How many windows are done, of one that is left.
        differs: By what the run in its folder differs.
        made_by: Versions or code that made one that is done, where they are others than today's.
    """

    kind: str
    folder: Path | None = None
    windows: int = 0
    differs: str = ""
    made_by: str = ""


def standing(member: Member) -> Standing:
    """What there is of a member, by the files in its output folder."""
    config = member.config
    if config is None or member.named_by_time or not isinstance(config.get("output_dir"), str):
        return Standing("new")
    asked = OmegaConf.create(config)
    try:
        expand_home(asked, PATHS)
    except ValueError:  # no such user, as the run will say
        return Standing("new")
    folder = Path(str(asked.output_dir))
    is_cleared = (folder / NEXT_CONFIG).is_file()  # it ended while it cleared the folder
    path = folder / (NEXT_CONFIG if is_cleared else "config.yaml")
    if asked.get("overwrite") is True or not path.is_file():
        return Standing("new", folder)
    try:
        there = plain(OmegaConf.load(path))
        found = list(differences(_decisive(there), _decisive(plain(OmegaConf.create(OmegaConf.to_yaml(asked))))))
    except Exception:  # whatever a damaged file holds; the run will say it
        return Standing("new", folder)
    if found:
        named = [f"{name} is {old!r} there and {new!r} here" for name, old, new in found[:_LONGEST]]
        more = f", and {len(found) - _LONGEST} more" if len(found) > _LONGEST else ""
        return Standing("other", folder, differs="; ".join(named) + more)
    if not is_cleared and all((folder / name).is_file() for name in ("results.json", "report.html")):
        origin = read_origin(folder)
        if changed := changed_inputs(origin, plain(asked)):
            return Standing("other", folder, differs="; ".join(changed))
        return Standing("done", folder, made_by=other_code(origin))
    return Standing("left", folder, windows=0 if is_cleared else _windows_done(folder))


def _decisive(config: Any) -> dict[str, Any]:
    """Those settings by which runs are the same or not."""
    return {key: value for key, value in config.items() if key not in _MAY_DIFFER}


def _windows_done(folder: Path) -> int:
    """Windows that the newest commit of a run has, as far as its manifest can be read."""
    windows = committed(folder, "windows")
    return len(windows) if isinstance(windows, list) else 0


@dataclass
class Pace:
    """How long runs take: forecasts, scaled by what the finished ones took.

    Attributes:
        seconds: Of each run, as its plan predicts them.
        predicted: Seconds of the finished runs, as predicted.
        measured: The same, as measured.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    predicted: float = 0.0
    measured: float = 0.0

    def expect(self, forecast: Mapping[str, Forecast], found: Mapping[str, Standing]) -> None:
        """Take the forecasts; of a run that is resumed, the share of its windows that are left."""
        for name, one in forecast.items():
            if not one.refused:
                left = 1 - min(1.0, found[name].windows / max(1, one.windows))
                self.seconds[name] = one.load + one.seconds * left

    def learn(self, predicted: float, measured: float) -> None:
        """Take what a finished run was predicted to take, and took."""
        self.predicted, self.measured = self.predicted + predicted, self.measured + measured

    def learn_from(self, folder: Path) -> None:
        """The same of a run of an earlier call, by its results."""
        try:
            results = read_results(folder)
        except ValueError:  # the report will say it
            return
        if results.get("predicted"):
            self.learn(
                results["predicted"]["seconds"] + results["seconds"].get("load", 0.0), results["seconds"]["total"]
            )

    def left(self, names: Iterable[str]) -> float | None:
        """Seconds that runs take; None where nothing is known of any. One that is not known takes as long as others."""
        names = list(names)
        known = [self.seconds[name] for name in names if name in self.seconds]
        if not known:
            return None
        scale = self.measured / self.predicted if self.predicted else 1.0
        return scale * sum(known) * len(names) / len(known)


def run_study(program: str, members: Sequence[Member], *, tracebacks: bool) -> dict[str, int]:
    """Run those members of a sweep that are not done, then write the report of all.

    Args:
        program: The module that is run.
        members: The runs.
        tracebacks: Whether the traceback of what is refused is shown as well.

    Returns:
        Exit statuses by the names of the members; that of a run that is done is 0.
    """
    _check_push(members)
    found = {member.name: standing(member) for member in members}
    left = [member for member in members if found[member.name].kind in ("left", "new")]
    ended = {member.name: 2 if found[member.name].kind == "other" else 0 for member in members}
    _say(*_survey(found))
    pace = Pace()
    for one in found.values():
        if one.kind == "done" and one.folder:
            pace.learn_from(one.folder)
    if len(left) > 1:  # a single run says by itself how long it takes
        forecast = forecasts(left)
        pace.expect(forecast, found)
        _say(*(f"will be refused: {name}: {one.refused}" for name, one in forecast.items() if one.refused))
        _say(_time_left(pace, left) or "how long they take is not known before the first has ended")
    for number, member in enumerate(left, 1):
        ended[member.name] = _run(program, member, pace, tracebacks=tracebacks)
        if number < len(left):
            _say(f"\n{number} of {_runs(len(left))} ended; {_time_left(pace, left[number:]) or 'time left unknown'}")
    return ended | _report(members)


def _check_push(members: Sequence[Member]) -> None:
    """End the command where several runs would be uploaded to one place."""
    places = [push for member in members if (push := (member.config or {}).get("push")) is not None]
    if several := [push for push in places if places.count(push) > 1]:
        said = f"push={several[0]} is one model of the Hub, but a sweep has several runs; upload one that is done."
        stop(said, status=2)


def _survey(found: Mapping[str, Standing]) -> Iterable[str]:
    """How many runs there are, and what there is of each."""
    kinds = {
        kind: [name for name, one in found.items() if one.kind == kind] for kind in ("done", "left", "other", "new")
    }
    said = {"done": "done", "left": "to be resumed", "other": "not to be run", "new": "to be started"}
    yield f"{_runs(len(found))}: " + ", ".join(f"{len(names)} {said[kind]}" for kind, names in kinds.items() if names)
    for name in kinds["done"]:
        by = f", by {found[name].made_by}; overwrite=true runs it again" if found[name].made_by else ""
        yield f"done: {name} ({found[name].folder}){by}"
    for name in kinds["left"]:
        yield f"to be resumed: {name} ({found[name].folder}, after window {found[name].windows})"
    for name in kinds["other"]:
        one = found[name]
        yield f"not to be run: {name}: {one.folder} holds another run: {one.differs}; overwrite=true replaces it"


def _run(program: str, member: Member, pace: Pace, *, tracebacks: bool) -> int:
    """Run a member, or resume it, as its folder is by now; its exit status."""
    now = standing(member)  # another command may have worked there
    if now.kind == "done":
        _say(f"\n== {member.name} ==", f"another command has done it ({now.folder})")
        return 0
    again = (member.config or {}).get("overwrite") is True
    remedy = "the runs of the sweep that were left are not started; give the same command again "
    began = time.monotonic()
    status = run_apart(
        program,
        member,
        more=shlex.split(as_argument("resume", now.folder)) if now.kind == "left" else (),
        remedy=remedy + ("without overwrite=true to continue" if again else "to continue"),
        tracebacks=tracebacks,
    )
    if not status and member.name in pace.seconds:
        pace.learn(pace.seconds[member.name], time.monotonic() - began)
    return status


def _report(members: Sequence[Member]) -> dict[str, int]:
    """The report of an experiment's runs, as a process of its own; its exit status if it is the report that failed."""
    found = {one.folder: one.kind for one in map(standing, members) if one.kind in ("done", "left") and one.folder}
    folders, is_whole = list(found), "left" not in found.values()  # of one that is not finished it says so
    configs = [member.config or {} for member in members]
    homes = {str(config.get("experiment_dir") or "") for config in configs}
    if "done" not in found.values() or "" in homes or configs[0].get("plan"):
        return {}
    out = ["--out", str(Path(homes.pop(), "report").expanduser())] if len(homes) == 1 else []
    _say("\n== report ==")
    command = [sys.executable, "-m", "lit_recon.report", *map(str, folders), *out]
    status = subprocess.run(command, check=False).returncode
    return {"report": status} if status and is_whole else {}


def _time_left(pace: Pace, members: Sequence[Member]) -> str:
    """How long runs take, in words; empty where it is not known."""
    seconds = pace.left(member.name for member in members)
    return "" if seconds is None else f"about {duration(seconds)} for {_runs(len(members))}"


def _runs(number: int) -> str:
    return f"{number} run{'s' if number != 1 else ''}"


def _say(*lines: str) -> None:
    """Print lines at once, before a process that is started next prints its own."""
    say("".join(f"{line}\n" for line in lines))
