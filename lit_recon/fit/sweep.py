"""The runs of a sweep (-m), each a process of its own, of which the next ones follow however one ends."""

import os
import subprocess
import sys

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from lit_recon.system.command_line import stop
from lit_recon.system.signals import Terminated, stoppable


def fit_apart(ended: dict[str, int], *, tracebacks: bool) -> None:
    """The run of a sweep that Hydra has composed; its exit status goes into `ended`, by what is its own.

    Args:
        ended: Exit statuses of the runs so far.
        tracebacks: Whether the traceback of what is refused is shown as well.
    """
    words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    given = {override.key_or_group: override for override in OverridesParser.create().parse_overrides(words)}
    same = {key for key, override in given.items() if not override.is_sweep_override()}  # in all runs
    if "output_dir" in same and "$" not in str(given["output_dir"].input_line):
        stop("output_dir is one folder, but a sweep has several runs; experiment_dir=<folder> moves all.", status=2)
    if "push" in same and "$" not in str(given["push"].input_line):
        stop(
            "push is one model of the Hub, but a sweep has several runs; upload one of them when it is done.", status=2
        )
    settings = HydraConfig.get().overrides.task
    name = " ".join([one for one in settings if one.partition("=")[0].lstrip("+~") not in same] or settings)
    ended[name] = _run(name, tracebacks=tracebacks)


def _run(name: str, *, tracebacks: bool) -> int:
    """One run of a sweep as a process of its own; its exit status.

    In one process, each run would find the memory that those before it left, and the end of one would be that of all.
    """
    about = HydraConfig.get()
    sys.stdout.write(f"\n== {name} ==\n")
    sys.stdout.flush()
    own = [*about.overrides.hydra, "hydra.mode=RUN", f"hydra.job.num={about.job.num}", f"hydra.job.id={about.job.id}"]
    environment = os.environ | {"HYDRA_FULL_ERROR": str(int(tracebacks))}
    command = [sys.executable, "-m", "lit_recon.fit", *about.overrides.task, *own]
    with stoppable(), subprocess.Popen(command, env=environment) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Terminated):  # Ctrl-C reaches both, SIGTERM this process only
                process.terminate()
            process.wait()  # it says what it leaves
            stop("interrupted: the runs of the sweep that were left are not started.", status=1)
    if status < 0:
        sys.stderr.write(f"{name}: ended by signal {-status}{', out of memory?' if status == -9 else ''}\n")
    return 1 if status < 0 else status
