"""What happens before a run: mistakes are collected and told in one message, and libraries are told to be quiet.

A ValueError here is a message to the user: what was given, what is allowed, what to do. `fit` prints it without a
traceback and exits with status 2.
"""

import difflib
import inspect
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException, MissingConfigException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from lit_recon.model.matrices import Matrix
from lit_recon.model.windows import MatrixWindow, Window
from lit_recon.modules.masked_weights import ReconstructionModule
from lit_recon.pruning.patterns import Pattern


class Problems:
    """Collects what is wrong, so that a user learns all of it at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        """Note one problem."""
        self.found.append(problem)

    def check(self, function: Callable[..., Any], *args: Any, about: str = "", **kwargs: Any) -> Any:
        """The function's result, or None with its error noted, behind `about`."""
        try:
            return function(*args, **kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            self.add(about + str(error))
            return None

    def instantiate(self, node: DictConfig, name: str) -> Any:
        """The object that a configuration node describes, or None with what is wrong noted."""
        try:
            return instantiate(node, _convert_="all")
        except MissingMandatoryValue as error:
            self.add(f"{error.full_key or name} has no value; give {error.full_key or name}=<value>.")
        except InstantiationException as error:
            cause = error.__cause__
            if isinstance(cause, MissingMandatoryValue):
                self.add(f"{cause.full_key} has no value; give {cause.full_key}=<value>.")
            elif isinstance(cause, ImportError):
                target = node.get("_target_")
                reason = " ".join(str(cause).split())
                self.add(
                    f"{name}._target_={target}: cannot be imported ({reason}); expected <file>.<class>, where the file "
                    "is in the working directory or the package is installed."
                )
            elif isinstance(cause, (ValueError, TypeError)):
                self.add(str(cause) if isinstance(cause, ValueError) else f"{name}: {cause}")
            else:
                self.add(f"{name}: {error}")
        return None

    def raise_all(self) -> None:
        """Raise a ValueError with all problems, if there are any."""
        if self.found:
            raise ValueError("\n".join(self.found))


def check_steps(max_epochs: Any, max_steps: Any, accumulate: Any) -> None:
    """Raise a ValueError where a window would be trained not at all or for ever."""
    if not all(isinstance(number, int) for number in (max_epochs, max_steps, accumulate)):
        raise ValueError("trainer.max_epochs, max_steps and accumulate_grad_batches are whole numbers.")
    if max_epochs == 0 or max_steps == 0 or (max_epochs < 0 and max_steps < 0) or accumulate < 1:
        raise ValueError(
            f"trainer.max_epochs={max_epochs} max_steps={max_steps} accumulate_grad_batches={accumulate}: expected "
            "max_epochs or max_steps of at least 1 (-1 leaves one of them open), accumulating 1 batch or more."
        )


class Refusal(Exception):
    """The user asked for something that cannot be, which only the model's weights could tell."""


def check_pattern(matrices: Sequence[Matrix], pattern: Pattern) -> None:
    """Raise a ValueError for matrices that the pattern does not fit."""
    misfits: list[str] = []
    for matrix in matrices:
        if matrix.input_dim is not None:
            try:
                pattern.check(matrix.name, *matrix.by_expert(matrix.weight).shape[1:])
            except ValueError as error:
                misfits.append(str(error))
    more = [f"... and {len(misfits) - 3} more matrices."] if len(misfits) > 3 else []
    if misfits:
        raise ValueError("\n".join(misfits[:3] + more))


def check_module(module: Callable[..., Any], layer: Window, *, single: bool) -> None:
    """Raise a ValueError where no LightningModule can be made of its settings.

    Args:
        module: Makes it from (window, masks, variance).
        layer: A layer, which needs no weights.
        single: Whether windows are single matrices.
    """
    window = MatrixWindow(layer.matrices()[0], layer) if single else layer
    masks = {matrix.name: torch.ones_like(matrix.weight, dtype=torch.bool) for matrix in window.matrices()}
    function = getattr(module, "func", module)  # its signature, which names what is wrong
    try:
        inspect.signature(function).bind(window, masks, 1.0, **getattr(module, "keywords", {}))
    except TypeError as error:
        raise ValueError(f"module: {error}") from error
    maker = function.__init__ if inspect.isclass(function) else function
    if (getattr(maker, "__module__", None) or "").startswith("lit_recon."):  # others may look at the window
        module(window, masks, 1.0)


def check_optimizer(module: "partial[Any]", problems: Problems, *, clipped: float | None) -> None:
    """Find bad rates and unknown options of a module's optimizer and schedule, by making them.

    Args:
        module: Makes the module; has both among its arguments, or neither.
        problems: Takes what is wrong.
        clipped: The norm that gradients in float16, which are scaled, are clipped to; None where they are not.
    """
    if "optimizer" not in module.keywords:
        return
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = problems.check(module.keywords["optimizer"], parameters, about="module.optimizer: ")
    schedule = module.keywords.get("scheduler")
    ours = getattr(module.func, "configure_optimizers", None) is ReconstructionModule.configure_optimizers
    if optimizer and schedule and ours:  # another may call it otherwise
        with suppress(Exception):  # of a function that is made for other numbers of steps
            steps = {"num_warmup_steps": 10, "num_training_steps": 100}
            problems.check(schedule, optimizer=optimizer, **steps, about="module.scheduler: ")
    if clipped and getattr(optimizer, "_step_supports_amp_scaling", False):
        problems.add(
            f"trainer.gradient_clip_val={clipped} with trainer.precision=16-mixed: a fused optimizer scales gradients "
            "back only as it steps; give module.optimizer.fused=false."
        )


def check_scored(matrices: Sequence[Matrix], *, allow_unscored: bool) -> None:
    """Raise a ValueError for matrices that cannot be scored, unless that is allowed."""
    unscored = [matrix for matrix in matrices if matrix.input_dim is None]
    if not unscored or allow_unscored:
        return
    share = sum(m.weight.numel() for m in unscored) / sum(m.weight.numel() for m in matrices)
    names = ", ".join(matrix.name for matrix in unscored[:3]) + (", ..." if len(unscored) > 3 else "")
    raise ValueError(
        f"{len(unscored)} of {len(matrices)} matrices ({share:.1%} of their parameters) cannot be scored: it is not "
        f"known how their inputs reach them ({names}); allow_unscored=true leaves them dense."
    )


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


def stop(message: str, *, status: int) -> NoReturn:
    """End the process with a message."""
    sys.stderr.write(message + "\n")
    raise SystemExit(status)


def quiet() -> None:
    """Keep libraries from saying once per window what is decided once per run, or does not concern the user."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # reading curves back, it tells where the file ends
    for message in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*`LightningModule.configure_optimizers` returned `None`.*",  # exact solutions need none
        ".*module\\(s\\) in eval mode at the start of training.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)
    threading.excepthook = _tell_of_thread


def _tell_of_thread(failure: threading.ExceptHookArgs) -> None:
    """Print what ended a thread; but TensorBoard's hands errors of the disk to the main thread, which tells them."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)
