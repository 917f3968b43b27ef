"""The command `python -m lit_recon.fit`: prune a language model and reconstruct it window by window. --help explains.

prepare: the configuration becomes objects, and everything that can be wrong is found     -> exit status 2
run:     load, plan, walk, save, read back, evaluate, report

HYDRA_FULL_ERROR=1 in the environment shows the traceback of what is refused.
"""

import lit_recon.system.environment  # noqa: F401, before what it is for

# isort: split
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lit_recon.fit.configure import prepare
from lit_recon.fit.output.folder import finish, is_finished
from lit_recon.fit.output.push import NotPushed, check_push, upload
from lit_recon.fit.resume_config import resumed
from lit_recon.fit.run import run
from lit_recon.fit.settings import earlier_run, is_text
from lit_recon.fit.study import run_study
from lit_recon.settings.command import Call, Command, refusing
from lit_recon.system.command_line import as_argument, stop


def fit(cfg: DictConfig, call: Call) -> None:
    """Prepare and run.

    Args:
        cfg: The composed configuration.
        call: This call of the command.
    """
    earlier = refusing(earlier_run, cfg)
    if earlier is not None:
        call.remedy = f"resume it with {as_argument('resume', earlier)}"
        drawn = finish(earlier, call.console)
        if drawn or (cfg.get("push") is not None and is_finished(earlier)):
            _upload(cfg, earlier, call)
            return
    job = refusing(lambda: prepare(cfg if earlier is None else resumed(cfg)))
    if not job.output.plan_only:
        call.remedy = f"resume it with {as_argument('resume', job.output.folder)}"
    folder = run(job, call.console)
    if folder is not None:
        _upload(job.output.config, folder, call, checked=True)


def _upload(cfg: Mapping[Any, Any], run: Path, call: Call, *, checked: bool = False) -> None:
    """Upload a finished run to the Hub, if that is asked for.

    Args:
        cfg: The configuration.
        run: The run's folder.
        call: This call of the command.
        checked: Whether it has been found out that it can be uploaded.
    """
    push = cfg.get("push")
    if push is None:
        return
    if not checked:
        refusing(check_push, push)
    try:
        upload(run, push, call.console)
    except NotPushed as error:
        stop(str(error), status=1)


def _renamed(word: str) -> str:
    """A word of the command line with its setting's name of today."""
    return re.sub(r"^([+~]*)module\.loss\.", r"\1loss.", word)  # its name up to 0.4


main = Command(
    config="fit", task=fit, is_text=is_text, example="output_dir=runs/first", renamed=_renamed, sweep=run_study
).main


if __name__ == "__main__":
    main()
