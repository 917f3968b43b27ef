"""Parts of a run's configuration as objects: model, data, criterion and the like; partial calls of what windows need.

Everything that is wrong with a part is added to the problems of the whole configuration.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import StoreSettings
from lit_recon.data.source import TextSource
from lit_recon.fit.job import callable_name
from lit_recon.model.loading import LanguageModel
from lit_recon.model.partition import Partition
from lit_recon.modules.rates import PROBE
from lit_recon.pruning.allocation.rules import Rules
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.patterns import Pattern
from lit_recon.pruning.refine import Refinement
from lit_recon.pruning.survey import Allocation
from lit_recon.reconstruction.retraining import Retraining
from lit_recon.reconstruction.tensorboard import LoggedWindows
from lit_recon.settings import parts
from lit_recon.settings.conf import members
from lit_recon.settings.values import given_of, plain
from lit_recon.system.command_line import Problems
from lit_recon.system.device import trainer_problem

PARTS: dict[str, type] = {  # what each is an object of
    "model": LanguageModel,
    "data": TextSource,
    "criterion": Criterion,
    "pattern": Pattern,
    "chain": Propagation,
    "store": StoreSettings,
    "windows": Partition,
    "retraining": Retraining,
    "logger": LoggedWindows,
    "refine": Refinement,
    "allocation": Allocation,
}
OPTIONAL = ("refine", "allocation")  # null where a run has none
MADE_LATER = ("loss", "module", "trainer")  # for each window; until then partial calls
SCHEDULE = ("precision", "max_epochs", "max_steps", "accumulate_grad_batches")  # what a run asks of its Trainer
ALSO = {"lr": Literal[PROBE]}  # of every optimizer (modules/rates.py)


def make_part(cfg: DictConfig, name: str, problems: Problems) -> Any:
    """The object that a part of the configuration describes; None with what is wrong added to the problems.

    That of a part that is made for each window is a partial call.
    """
    node = cfg.get(name)
    if node is None and name in OPTIONAL:
        return None
    if name == "module" and isinstance(node, DictConfig) and _has_loss_of_group(node):  # a part of its own
        node = node.copy()
        with open_dict(node):
            node.pop("loss")
    if name not in MADE_LATER:
        return parts.make_part(node, name, problems, kind=PARTS[name], also=ALSO)
    leave_out = SCHEDULE if name == "trainer" else ()  # asked for by rules of their own
    make = parts.make_partial(node, name, problems, leave_out=leave_out, also=ALSO)
    return None if make is None else _made_later(make, name, node, problems)


def _made_later(make: "partial[Any]", name: str, node: DictConfig, problems: Problems) -> Any:
    """A partial call of what is made for each window, or None with a problem."""
    if name == "trainer" and (problem := trainer_problem(make)):
        problems.add(problem)
        return None
    if name == "loss" and not node.get("_partial_"):  # of a class
        return problems.check(make, about=f"{given_of(name)}: ")
    return make


def take_rules(cfg: DictConfig, problems: Problems) -> tuple[DictConfig, Rules | None]:
    """The rules that `sparsity` may be, and the configuration with a number in their place, for matrices they leave."""
    if not OmegaConf.is_list(cfg.get("sparsity")):
        return cfg, None
    cfg = cfg.copy()
    found = problems.check(Rules, plain(cfg.sparsity))
    cfg.sparsity = 0.0
    return cfg, found


def trainer_settings(cfg: DictConfig, problems: Problems) -> dict[str, Any]:
    """The settings of the Trainer, or none with a problem."""
    try:
        settings = plain(cfg.get("trainer"))
    except OmegaConfBaseException:
        return {}  # told of with the part
    if not isinstance(settings, dict):
        return {}
    if missing := [name for name in SCHEDULE if name not in settings]:
        problems.add(f"trainer.{missing[0]}: a run needs it; leave ~trainer.{missing[0]} out.")
        return {}
    return settings


def join_groups(node: DictConfig, parts: Mapping[str, Any], problems: Problems) -> None:
    """Give a module the loss that was chosen; add what is wrong with groups that a module needs, or does not take."""
    module = parts["module"]
    if _has_loss_of_group(node) and parts["loss"] is not None:
        module.keywords["loss"] = parts["loss"]
    taken = inspect.signature(module.func).parameters
    kinds = {parameter.kind for parameter in taken.values()}
    for group in ("loss", "optimizer", "scheduler"):
        if given_of(group) != group and group not in taken and inspect.Parameter.VAR_KEYWORD not in kinds:
            problems.add(f"{given_of(group)}: {callable_name(module)} takes no {group}; leave that out.")
        elif OmegaConf.is_missing(node, group):
            others = ", ".join(member for member in members(group) if member != "none")
            problems.add(f"{given_of(group)}: {callable_name(module)} needs one; choose one of {others}.")


def _has_loss_of_group(node: DictConfig) -> bool:
    """Whether a module's loss is that of the group `loss`, and no function that is given to the module itself."""
    return "loss" in node.keys() and OmegaConf.is_interpolation(node, "loss")
