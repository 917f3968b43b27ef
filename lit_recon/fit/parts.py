"""Parts of a configuration as objects: model, data, criterion and the like; partial calls of what each window needs.

Everything that is wrong with a part is added to the problems of the whole configuration.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import StoreSettings
from lit_recon.data.source import TextSource
from lit_recon.fit.annotations import wrong_types
from lit_recon.fit.job import callable_name
from lit_recon.fit.moved import FOLDERS, MOVED
from lit_recon.fit.settings import given_of, plain, targets
from lit_recon.model.loading import LanguageModel
from lit_recon.model.partition import Partition
from lit_recon.pruning.allocation.rules import Rules
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.patterns import Pattern
from lit_recon.pruning.refine import Refinement
from lit_recon.pruning.survey import Allocation
from lit_recon.reconstruction.retraining import Retraining
from lit_recon.reconstruction.tensorboard import LoggedWindows
from lit_recon.system.command_line import Problems, in_words

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
PACKAGE = Path(__file__).parents[1]
# In a wheel conf/ stands in the package; in a checkout next to it.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())


def make_part(cfg: DictConfig, name: str, problems: Problems) -> Any:
    """The object that a part of the configuration describes; None with what is wrong added to the problems.

    That of a part that is made for each window is a partial call.
    """
    node = cfg.get(name)
    if node is None and name in OPTIONAL:
        return None
    if not isinstance(node, DictConfig) or "_target_" not in node.keys():  # also of no value
        problems.add(
            f"{given_of(name)}: a run needs a {name} with _target_=<file>.<class>; leave that out, or choose a member "
            f"of the group ({', '.join(sorted(path.stem for path in (CONF / name).glob('*.yaml'))) or 'none here'})."
        )
        return None
    before = len(problems.found)
    for key, old in targets(OmegaConf.to_container(node, resolve=False), name):
        if old in MOVED:
            problems.add(f"{key}={old} has moved; use {MOVED[old]}.")
    missing = () if name in MADE_LATER else sorted(OmegaConf.missing_keys(node) - {"_target_"})
    for key in missing:
        problems.add(f"{name}.{key} has no value; give {name}.{key}=<value>.")
    if name == "module" and _has_loss_of_group(node):  # a part of its own
        node = node.copy()
        with open_dict(node):
            node.pop("loss")
    make = None if problems.found[before:] else _instantiated(node, name, problems)
    if make is None:
        return None
    made = None
    if name not in MADE_LATER:
        try:
            made = make()
        except Exception as error:
            _add_failure(error, name, str(node["_target_"]), problems)
    leave_out = SCHEDULE if name == "trainer" else ()  # asked for by rules of their own
    if made is not None or name in MADE_LATER or not problems.found[before:]:
        for problem in wrong_types(make, name, leave_out=leave_out):
            problems.add(problem)
    if problems.found[before:]:
        return None
    if name in MADE_LATER:
        return _made_later(make, name, node, problems)
    if not isinstance(made, PARTS[name]):
        kind = PARTS[name]
        needed = f"an object like {kind.__module__}.{kind.__name__}"
        problems.add(f"{name}._target_={node['_target_']}: expected {needed}.")
        return None
    return made


def _made_later(make: "partial[Any]", name: str, node: DictConfig, problems: Problems) -> Any:
    """A partial call of what is made for each window, or None with a problem."""
    if name == "trainer" and not (isinstance(make.func, type) and issubclass(make.func, Trainer)):
        problems.add(f"trainer._target_={make.func}: expected lightning.Trainer, or a class that inherits from it.")
        return None
    if name == "loss" and not node.get("_partial_"):  # of a class
        return problems.check(make, about=f"{given_of(name)}: ")
    return make


def _instantiated(node: DictConfig, name: str, problems: Problems) -> "partial[Any] | None":
    """A partial call of a part's target with what its settings describe."""
    target = str(OmegaConf.to_container(node, resolve=False).get("_target_"))  # type: ignore[union-attr]
    try:
        make = instantiate(node, _partial_=True, _convert_="all")
        assert isinstance(make, partial)
        return make
    except Exception as error:
        _add_failure(error, name, target, problems)
        return None


def _add_failure(error: Exception, name: str, target: str, problems: Problems) -> None:
    """Add what is wrong with a part that cannot be made."""
    cause = (error.__cause__ or error) if isinstance(error, InstantiationException) else error
    if isinstance(cause, MissingMandatoryValue):
        missing = cause.full_key or name
        problems.add(f"{missing} has no value; give {missing}=<value>.", error)
    elif isinstance(cause, ImportError):
        reason = " ".join(str(cause).split())
        moved = [f"lit_recon.{a} is lit_recon.{b} now. " for a, b in FOLDERS.items() if f"'lit_recon.{a}'" in reason]
        problems.add(
            f"{name}._target_={target}: cannot be imported ({reason}). {''.join(moved)}Expected <file>.<class>, "
            "where the file is in the working directory or the package is installed.",
            error,
        )
    elif cause is error and type(cause) is ValueError and target.startswith("lit_recon."):
        problems.add(str(cause), error)  # names its setting
    else:
        kind = PARTS.get(name)
        needed = f"; expected an object like {kind.__module__}.{kind.__name__}" if kind else ""
        problems.add(f"{given_of(name)}: {in_words(cause)}{needed}", error)


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
            members = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem != "none"))
            problems.add(f"{given_of(group)}: {callable_name(module)} needs one; choose one of {members}.")


def _has_loss_of_group(node: DictConfig) -> bool:
    """Whether a module's loss is that of the group `loss`, and no function that is given to the module itself."""
    return "loss" in node.keys() and OmegaConf.is_interpolation(node, "loss")
