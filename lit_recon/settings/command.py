"""A command that Hydra composes a configuration for: its command line, and how each of its ends is one message.

    main = Command(config="fit", ...).main       python -m lit_recon.fit [group=member] [key=value] ...

What is refused ends with status 2 before any work, what fails later with status 1, neither with a traceback
(HYDRA_FULL_ERROR=1 in the environment shows it). -m makes a process of each run (sweep.py).
"""

import difflib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.logging import RichHandler

from lit_recon.settings.conf import CONF, members
from lit_recon.settings.sweep import Member, composed, run_all
from lit_recon.system.command_line import Refusal, concerning, import_from_here, in_hydras_grammar, shortened, stop
from lit_recon.system.commits import CommitError
from lit_recon.system.console import Console
from lit_recon.system.finite import Unusable
from lit_recon.system.quiet_libraries import quiet
from lit_recon.system.signals import stoppable
from lit_recon.system.tensor_files import allow_open_files
from lit_recon.system.terminal import readable_output

FULL_ERROR = "HYDRA_FULL_ERROR"
Result = TypeVar("Result")


@dataclass
class Call:
    """One call of a command.

    Attributes:
        console: Where it writes.
        remedy: What an interrupted call has left behind, and how to resume it; the task keeps it up to date.
    """

    console: Console
    remedy: str = "nothing was written."


def refusing(look: Callable[..., Result], *given: Any) -> Result:
    """What a function that looks at settings returns; what it raises is a Refusal."""
    try:
        with concerning("the settings"):
            return look(*given)
    except ValueError as error:
        raise Refusal(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of the package.

    Attributes:
        config: Name of its folder in the package, and of its configuration in conf/.
        task: What it does with a composed configuration; what it refuses is a Refusal.
        is_text: Whether a setting is a text, or a list of texts.
        example: A setting of it, for messages.
        renamed: A word of the command line with its setting's name of today.
        sweep: What it does with the runs of a sweep; given the module that is run, the runs and whether tracebacks are
            shown, it returns their exit statuses by their names.
    """

    config: str
    task: Callable[[DictConfig, Call], None]
    is_text: Callable[[str], bool]
    example: str
    renamed: Callable[[str], str] = str
    sweep: Callable[..., dict[str, int]] = run_all

    def main(self) -> None:
        """The command line, which signals end at any moment with a message."""
        readable_output()
        import_from_here()
        allow_open_files()
        try:
            with stoppable():
                self._compose()
        except KeyboardInterrupt:
            stop("interrupted: nothing was written.", status=1)

    def in_grammar(self, arguments: Sequence[str]) -> list[str]:
        """The command line so that Hydra reads it as it was meant."""
        sweep = any(word in ("-m", "--multirun") or re.match(r"\+?experiment=", word) for word in arguments)
        words = [self.renamed(word) for word in arguments]
        names = (word.partition("=")[0].lstrip("+") for word in words)
        texts = [name for name in names if self.is_text(name)]
        return [in_hydras_grammar(word, texts=texts, sweep=sweep) for word in words]

    def _compose(self) -> None:
        """Hydra composes the configuration, one for each run of a sweep."""
        members: list[Member] = []
        failures: list[Exception] = []
        with _hydra_that_raises() as tracebacks, tempfile.TemporaryDirectory(prefix="lit_recon.") as scratch:
            os.environ["LIT_RECON_SCRATCH"] = scratch  # conf/: where Hydra leaves a file per sweep

            def task(cfg: DictConfig) -> None:
                try:
                    if HydraConfig.get().mode == RunMode.MULTIRUN:
                        members.append(composed(cfg))
                    else:
                        self._call(cfg, tracebacks=tracebacks)
                except Exception as error:  # Hydra would print the whole command line in front of it
                    failures.append(error)

            sys.argv[1:] = self.in_grammar(sys.argv[1:])
            try:
                hydra.main(config_path=str(CONF.resolve()), config_name=self.config, version_base="1.3")(task)()
            except Exception as error:  # Hydra composes; what the run raises is in `failures`
                message = self.explain_override(error, sys.argv[1:])
                stop(message, status=2, cause=error if tracebacks else None)
        if failures:
            raise failures[0]
        if members:
            _conclude(self.sweep(f"lit_recon.{self.config}", members, tracebacks=tracebacks))

    def _call(self, cfg: DictConfig, *, tracebacks: bool) -> None:
        """Do the task; how it ends is said in one message.

        Args:
            cfg: The composed configuration.
            tracebacks: Whether the traceback of what is refused is shown as well.
        """
        call = Call(Console(width=None if sys.stdout.isatty() else 120))
        handler = RichHandler(console=call.console, show_time=False, show_level=False, show_path=False)
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
        quiet()
        try:
            self.task(cfg, call)
        except Refusal as error:
            stop(str(error), status=2, cause=error if tracebacks else None)
        except (CommitError, Unusable) as error:
            stop(str(error), status=1)
        except KeyboardInterrupt as interrupt:
            stop(f"interrupted: {str(interrupt) or call.remedy}", status=1)

    def explain_override(self, error: Exception, arguments: Sequence[str]) -> str:
        """What was wrong on the command line, and the choices there were."""
        words = [word for word in arguments if not word.startswith("-")]
        for word in words:
            if not re.match(r"[+~]", word) and "=" not in word:
                return f"{shortened(word)}: expected <setting>=<value>, such as {self.example}, or ~<setting>."
        for word in words:
            group, _, member = word.lstrip("+").partition("=")
            known = members(group) if re.fullmatch(r"[\w/]+", group) else []
            several = member.split(",") if not isinstance(error, MissingConfigException) or "," in member else [member]
            if known and any(one.strip("'\"") not in known for one in several if "${" not in one):
                return f"{shortened(word)}: unknown; choose one of {', '.join(known)}."
        unknown = re.search(r"Could not override '([^']+)'", str(error))
        if unknown:
            return self._explain_unknown(unknown[1], arguments)
        ambiguous = re.search(r"Ambiguous value for argument '(.*?)'$", str(error), re.MULTILINE)
        if ambiguous:
            name, _, value = ambiguous[1].partition("=")
            return f"{ambiguous[1]}: several values; a list is {name}=[{value}], and -m makes a run of each."
        said = shortened(" ".join(str(error).split()))
        return said if any(word in said for word in words) else f"{shortened(' '.join(words))}: {said}"

    def _explain_unknown(self, key: str, arguments: Sequence[str]) -> str:
        """An unknown setting, and those that there are next to it."""
        choices = self._keys_beside(key, arguments)
        parent, _, name = key.rpartition(".")
        near = difflib.get_close_matches(name, choices, n=1)
        return (
            f"{key}: unknown setting; {parent or 'the top level'} has {', '.join(choices)}."
            + (f" Did you mean {f'{parent}.' if parent else ''}{near[0]}?" if near and near[0] != name else "")
            + f" A new one needs a plus sign: +{key}=..."
        )

    def _keys_beside(self, key: str, arguments: Sequence[str]) -> list[str]:
        """The keys of the deepest part of the configuration that `key` leads to."""
        groups = {path.name for path in CONF.iterdir() if path.is_dir()}
        # A sweep's choices are left out: without them its other settings are still known.
        chosen = [argument for argument in arguments if argument.partition("=")[0] in groups and "," not in argument]
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            node: Any = compose(self.config, overrides=chosen)
        for part in key.split(".")[:-1]:
            child = OmegaConf.select(node, part, throw_on_missing=False)
            if not isinstance(child, DictConfig):
                break
            node = child
        return sorted(str(name) for name in node)


def _conclude(ended: Mapping[str, int]) -> None:
    """End the process where runs of a sweep failed: with their exit status if all ended alike, else with status 1."""
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
