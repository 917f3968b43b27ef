"""The command `python -m lit_recon.fit`: prune a language model and reconstruct it window by window. --help explains.

prepare: the configuration becomes objects, and everything that can be wrong is found     -> exit status 2
run:     load, plan, walk, save, read back, evaluate, report

HYDRA_FULL_ERROR=1 in the environment shows the traceback of what is refused.
"""

import lit_recon.system.environment  # noqa: F401, before what it is for

# isort: split
import re

from omegaconf import DictConfig

from lit_recon.fit.configure import prepare
from lit_recon.fit.output.folder import finish
from lit_recon.fit.resume_config import resumed
from lit_recon.fit.run import run
from lit_recon.fit.settings import earlier_run, is_text
from lit_recon.fit.study import run_study
from lit_recon.settings.command import Call, Command, refusing
from lit_recon.system.command_line import as_argument


def fit(cfg: DictConfig, call: Call) -> None:
    """Prepare and run.

    Args:
        cfg: The composed configuration.
        call: This call of the command.
    """
    earlier = refusing(earlier_run, cfg)
    if earlier is not None:
        call.remedy = f"resume it with {as_argument('resume', earlier)}"
        if finish(earlier, call.console):
            return
    job = refusing(lambda: prepare(cfg if earlier is None else resumed(cfg)))
    if not job.output.plan_only:
        call.remedy = f"resume it with {as_argument('resume', job.output.folder)}"
    run(job, call.console)


def _renamed(word: str) -> str:
    """A word of the command line with its setting's name of today."""
    return re.sub(r"^([+~]*)module\.loss\.", r"\1loss.", word)  # its name up to 0.4


main = Command(
    config="fit", task=fit, is_text=is_text, example="output_dir=runs/first", renamed=_renamed, sweep=run_study
).main


if __name__ == "__main__":
    main()
