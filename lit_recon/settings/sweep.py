"""The runs of a sweep (-m, or an experiment), each a process of its own; the next ones follow however one ends.

Hydra composes all of them before the first is started, so that what cannot be composed is said at once. What a command
knows of its runs besides - which are done, how long the others take - it adds itself (fit/study.py).
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lit_recon.settings.values import plain
from lit_recon.system.command_line import stop
from lit_recon.system.signals import Terminated, stoppable
from lit_recon.system.terminal import say


@dataclass(frozen=True)
class Member:
    """A run of a sweep, composed.

    Attributes:
        name: What is its own of its settings, as on a command line.
        words: Its command line.
        of_hydra: What Hydra needs besides to compose it again.
        config: Its configuration with everything resolved; None where it cannot be, as its own process will say.
        named_by_time: Whether the output folder's name is made of the time, which its own process takes.
    """

    name: str
    words: Sequence[str]
    of_hydra: Sequence[str]
    config: dict[str, Any] | None
    named_by_time: bool


def composed(cfg: DictConfig) -> Member:
    """The run of a sweep that Hydra is at, with its configuration."""
    words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    given = {override.key_or_group: override for override in OverridesParser.create().parse_overrides(words)}
    same = {key for key, override in given.items() if not override.is_sweep_override()}  # in all runs
    if "output_dir" in same and "$" not in str(given["output_dir"].input_line):
        stop("output_dir is one folder, but a sweep has several runs; experiment_dir=<folder> moves all.", status=2)
    about = HydraConfig.get()
    settings = list(about.overrides.task)
    try:
        config = plain(cfg)
    except OmegaConfBaseException:
        config = None
    return Member(
        name=" ".join([one for one in settings if one.partition("=")[0].lstrip("+~") not in same] or settings),
        words=settings,
        of_hydra=[
            *about.overrides.hydra,
            "hydra.mode=RUN",
            f"hydra.job.num={about.job.num}",
            f"hydra.job.id={about.job.id}",
        ],
        config=config,
        named_by_time="${now:" in str(cfg._get_node("output_dir", validate_access=False)),
    )


def run_all(program: str, members: Sequence[Member], *, tracebacks: bool) -> dict[str, int]:
    """Run all members, one after the other; their exit statuses by their names."""
    return {member.name: run_apart(program, member, tracebacks=tracebacks) for member in members}


def run_apart(
    program: str,
    member: Member,
    *,
    more: Sequence[str] = (),
    remedy: str = "the runs of the sweep that were left are not started",
    tracebacks: bool,
) -> int:
    """One run of a sweep as a process of its own; its exit status.

    In one process, each run would find the memory that those before it left, and the end of one would be that of all.

    Args:
        program: The module that is run, such as "lit_recon.fit".
        member: The run.
        more: Words of its command line that the sweep adds.
        remedy: What is said of the sweep where Ctrl-C ends it.
        tracebacks: Whether the traceback of what is refused is shown as well.
    """
    say(f"\n== {member.name} ==\n")
    environment = os.environ | {"HYDRA_FULL_ERROR": str(int(tracebacks))}
    command = [sys.executable, "-m", program, *member.words, *more, *member.of_hydra]
    with stoppable(), subprocess.Popen(command, env=environment) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Terminated):  # Ctrl-C reaches both, SIGTERM this process only
                process.terminate()
            process.wait()  # it says what it leaves
            stop(f"interrupted: {remedy}.", status=1)
    if status < 0:
        say(f"{member.name}: ended by signal {-status}{', out of memory?' if status == -9 else ''}\n", error=True)
    return 1 if status < 0 else status
