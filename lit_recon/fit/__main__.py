"""The command `python -m lit_recon.fit`: prune a language model and reconstruct it window by window. --help explains.

prepare: the configuration becomes objects, and everything that can be wrong is found     -> exit status 2
run:     load, plan, walk, save, read back, evaluate, report

HYDRA_FULL_ERROR=1 in the environment shows the traceback of what is refused.
"""

import lit_recon.system.environment  # noqa: F401, before what it is for

# isort: split
import difflib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.logging import RichHandler

from lit_recon.fit.configure import prepare
from lit_recon.fit.job import Job
from lit_recon.fit.output.folder import finish, is_finished
from lit_recon.fit.output.push import NotPushed, check_push, upload
from lit_recon.fit.parts import CONF
from lit_recon.fit.resume_config import resumed
from lit_recon.fit.run import run
from lit_recon.fit.settings import earlier_run, is_text
from lit_recon.fit.sweep import fit_apart
from lit_recon.system.command_line import (
    Refusal,
    as_argument,
    concerning,
    import_from_here,
    in_hydras_grammar,
    shortened,
    stop,
)
from lit_recon.system.commits import CommitError
from lit_recon.system.finite import NotFinite
from lit_recon.system.quiet_libraries import quiet
from lit_recon.system.signals import stoppable
from lit_recon.system.tensor_files import allow_open_files
from lit_recon.system.terminal import readable_output

FULL_ERROR = "HYDRA_FULL_ERROR"


def fit(cfg: DictConfig, *, tracebacks: bool = False) -> None:
    """Prepare and run; how a run ends is said in one message.

    Args:
        cfg: The composed configuration.
        tracebacks: Whether the traceback of what is refused is shown as well.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
    quiet()
    remedy = "nothing was written."
    try:
        earlier = _refusing(earlier_run, cfg)
        if earlier is not None:
            remedy = f"resume it with {as_argument('resume', earlier)}"
            drawn = finish(earlier, console)
            if drawn or cfg.get("push") is not None and is_finished(earlier):
                _upload(cfg, earlier, console)
                return
        job: Job = _refusing(lambda: prepare(cfg if earlier is None else resumed(cfg)))
        if not job.output.plan_only:
            remedy = f"resume it with {as_argument('resume', job.output.folder)}"
        folder = run(job, console)
        if folder is not None:
            _upload(job.output.config, folder, console, checked=True)
    except Refusal as error:
        stop(str(error), status=2, cause=error if tracebacks else None)
    except (CommitError, NotFinite, NotPushed) as error:
        stop(str(error), status=1)
    except KeyboardInterrupt as interrupt:
        stop(f"interrupted: {str(interrupt) or remedy}", status=1)


def _upload(cfg: Mapping[Any, Any], folder: Path, console: Console, *, checked: bool = False) -> None:
    """Upload a finished run to the Hub, if that is asked for.

    Args:
        cfg: The configuration.
        folder: The run's folder.
        console: Where to say so.
        checked: Whether it has been found out that it can be uploaded.
    """
    push = cfg.get("push")
    if push is None:
        return
    if not checked:
        _refusing(check_push, push)
    upload(folder, push, console)


def _refusing(look: Any, *given: Any) -> Any:
    """What a function that looks at settings returns; what it raises is a Refusal."""
    try:
        with concerning("the settings"):
            return look(*given)
    except ValueError as error:
        raise Refusal(str(error)) from error


def main() -> None:
    """The command line, which signals end at any moment with a message."""
    readable_output()
    import_from_here()
    allow_open_files()
    try:
        with stoppable():
            _command()
    except KeyboardInterrupt:
        stop("interrupted: nothing was written.", status=1)


def _command() -> None:
    """Hydra composes the configuration, one for each run of a sweep."""
    ended: dict[str, int] = {}
    failures: list[Exception] = []
    with _hydra_that_raises() as tracebacks, tempfile.TemporaryDirectory(prefix="lit_recon.") as scratch:
        os.environ["LIT_RECON_SCRATCH"] = scratch  # conf/fit.yaml: where Hydra leaves a file per sweep

        def task(cfg: DictConfig) -> None:
            try:
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    fit_apart(ended, tracebacks=tracebacks)
                else:
                    fit(cfg, tracebacks=tracebacks)
            except Exception as error:  # Hydra would print the whole command line in front of it
                failures.append(error)

        sys.argv[1:] = in_grammar(sys.argv[1:])
        try:
            hydra.main(config_path=str(CONF.resolve()), config_name="fit", version_base="1.3")(task)()
        except Exception as error:  # Hydra composes; what the run raises is in `failures`
            message = explain_override(error, sys.argv[1:], CONF)
            stop(message, status=2, cause=error if tracebacks else None)
    if failures:
        raise failures[0]
    failed = [name for name, status in ended.items() if status]
    if failed:
        alike = len(set(ended.values())) == 1  # refused all: 2; else 1
        message = f"{len(failed)} of {len(ended)} runs failed: {'; '.join(failed)}"
        stop(message, status=ended[failed[0]] if alike else 1)


@contextmanager
def _hydra_that_raises() -> Iterator[bool]:
    """A context in which Hydra raises what is wrong instead of printing it; whether the user asked for tracebacks."""
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"
    try:
        yield before == "1"
    finally:
        os.environ[FULL_ERROR] = before or "0"


def in_grammar(arguments: Sequence[str]) -> list[str]:
    """The command line so that Hydra reads it as it was meant."""
    sweep = any(word in ("-m", "--multirun") or re.match(r"\+?experiment=", word) for word in arguments)
    words = [re.sub(r"^([+~]*)module\.loss\.", r"\1loss.", word) for word in arguments]  # its name up to 0.4
    names = (word.partition("=")[0].lstrip("+") for word in words)
    texts = [name for name in names if is_text(name)]
    return [in_hydras_grammar(word, texts=texts, sweep=sweep) for word in words]


def explain_override(error: Exception, arguments: Sequence[str], conf: Path) -> str:
    """What was wrong on the command line, and the choices there were."""
    words = [word for word in arguments if not word.startswith("-")]
    for word in words:
        if not re.match(r"[+~]", word) and "=" not in word:
            return f"{shortened(word)}: expected <setting>=<value>, such as output_dir=runs/first, or ~<setting>."
    for word in words:
        group, _, member = word.lstrip("+").partition("=")
        members = sorted(path.stem for path in (conf / group).glob("*.yaml")) if re.fullmatch(r"[\w/]+", group) else []
        several = member.split(",") if not isinstance(error, MissingConfigException) or "," in member else [member]
        if members and any(one.strip("'\"") not in members for one in several if "${" not in one):
            return f"{shortened(word)}: unknown; choose one of {', '.join(members)}."
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if unknown:
        return _explain_unknown(unknown[1], arguments, conf)
    ambiguous = re.search(r"Ambiguous value for argument '(.*?)'$", str(error), re.MULTILINE)
    if ambiguous:
        name, _, value = ambiguous[1].partition("=")
        return f"{ambiguous[1]}: several values; a list is {name}=[{value}], and -m makes a run of each."
    said = shortened(" ".join(str(error).split()))
    return said if any(word in said for word in words) else f"{shortened(' '.join(words))}: {said}"


def _explain_unknown(key: str, arguments: Sequence[str], conf: Path) -> str:
    """An unknown setting, and those that there are next to it."""
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
