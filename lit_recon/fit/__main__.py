"""The command `python -m lit_recon.fit`: prune a language model and reconstruct it window by window. --help explains.

prepare: the configuration becomes objects, and everything that can be wrong is found     -> exit status 2
run:     load, plan, walk, save, read back, evaluate, report
"""

import lit_recon.system.environment  # noqa: F401, before what it is for

# isort: split
import difflib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler

from lit_recon.fit.configure import CONF, prepare, resumed
from lit_recon.fit.output.folder import finish
from lit_recon.fit.run import run
from lit_recon.fit.sweep import fit_apart
from lit_recon.system.command_line import Refusal, stop
from lit_recon.system.commits import CommitError
from lit_recon.system.quiet_libraries import quiet
from lit_recon.system.signals import stoppable
from lit_recon.system.tensor_files import allow_open_files
from lit_recon.system.terminal import readable_output


def fit(cfg: DictConfig) -> None:
    """Prepare and run; how a run ends is said in one message."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
    quiet()
    remedy = f"resume it with resume={cfg.resume}" if cfg.resume else "nothing was written."
    try:
        if cfg.resume is not None and finish(Path(str(cfg.resume)), console):
            return
        try:
            job = prepare(cfg if cfg.resume is None else resumed(cfg))
        except ValueError as error:
            raise Refusal(str(error)) from error
        if not job.output.plan_only:
            remedy = f"resume it with resume={job.output.folder}"
        run(job, console)
    except Refusal as error:
        stop(str(error), status=2)
    except CommitError as error:
        stop(str(error), status=1)
    except KeyboardInterrupt as interrupt:
        stop(f"interrupted: {str(interrupt) or remedy}", status=1)


def main() -> None:
    """The command line, which signals end at any moment with a message."""
    readable_output()
    allow_open_files()
    try:
        with stoppable():
            _command()
    except KeyboardInterrupt:
        stop("interrupted: nothing was written.", status=1)


def _command() -> None:
    """Hydra composes the configuration, one for each run of a sweep."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what is wrong instead of printing it and exiting with 1
    ended: dict[str, int] = {}

    def task(cfg: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            fit_apart(ended)
        else:
            fit(cfg)

    with tempfile.TemporaryDirectory(prefix="lit_recon.") as scratch:
        os.environ["LIT_RECON_SCRATCH"] = scratch  # conf/fit.yaml: where Hydra leaves a file per sweep
        try:
            hydra.main(config_path=str(CONF.resolve()), config_name="fit", version_base="1.3")(task)()
        except (HydraException, OmegaConfBaseException) as error:
            stop(explain_override(error, sys.argv[1:], CONF), status=2)
    failed = [name for name, status in ended.items() if status]
    if failed:
        alike = len(set(ended.values())) == 1  # refused all: 2; else 1
        message = f"{len(failed)} of {len(ended)} runs failed: {'; '.join(failed)}"
        stop(message, status=ended[failed[0]] if alike else 1)


def explain_override(error: Exception, arguments: Sequence[str], conf: Path) -> str:
    """What was wrong on the command line, and the choices there were."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, member = (error.missing_cfg_file or "").rpartition("/")
        return f"{group}={member}: unknown; choose one of {', '.join(error.options)}."
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if not unknown:
        return " ".join(str(error).split())
    key = unknown[1]
    choices = _keys_beside(key, arguments, conf)
    parent, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, choices, n=1)
    return (
        f"{key}: unknown setting; {parent or 'the top level'} has {', '.join(choices)}."
        + (f" Did you mean {f'{parent}.' if parent else ''}{near[0]}?" if near and near[0] != name else "")
        + f" A new one needs a plus sign: +{key}=..."
    )


def _keys_beside(key: str, arguments: Sequence[str], conf: Path) -> list[str]:
    """The keys of the deepest part of the configuration that `key` leads to."""
    groups = {path.name for path in conf.iterdir() if path.is_dir()}
    # A sweep's choices are left out: without them its other settings are still known.
    members = [argument for argument in arguments if argument.partition("=")[0] in groups and "," not in argument]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        node: Any = compose("fit", overrides=members)
    for part in key.split(".")[:-1]:
        child = OmegaConf.select(node, part, throw_on_missing=False)
        if not isinstance(child, DictConfig):
            break
        node = child
    return sorted(str(name) for name in node)


if __name__ == "__main__":
    main()
