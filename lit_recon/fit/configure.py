"""From the configuration to a Job: every part as an object, every problem in one message.

With resume_config.py the only file that sees the configuration.
"""

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from transformers import PreTrainedModel

from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import StoreSettings
from lit_recon.data.source import TextSource
from lit_recon.fit.annotations import wrong_types
from lit_recon.fit.checks import check_model, check_module, check_samples, check_settings, prunes_apart
from lit_recon.fit.job import Execution, Job, Method, Output, Schedule, callable_name, num_arrays
from lit_recon.fit.moved import FOLDERS, MOVED
from lit_recon.fit.output.folder import ACTIVATIONS, check_output, check_writable, folder_state
from lit_recon.fit.output.inputs import check_inputs
from lit_recon.fit.plan.memory_limit import parse_limit
from lit_recon.fit.rehearsal import rehearse
from lit_recon.fit.samples import make_samples
from lit_recon.fit.settings import check_call, expand_home, given, given_of, plain, targets
from lit_recon.model.loading import LanguageModel
from lit_recon.model.partition import Partition
from lit_recon.model.windows import WindowKind
from lit_recon.modules.norms_biases import prepare_model
from lit_recon.modules.trained import needs_gram
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.patterns import Pattern
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.reconstruction.retraining import Retraining
from lit_recon.system.command_line import Problems, concerning, in_words, shortened
from lit_recon.system.device import Compute, without_strategy

log = logging.getLogger(__name__)

PARTS: dict[str, type] = {  # what each is an object of
    "model": LanguageModel,
    "data": TextSource,
    "criterion": Criterion,
    "pattern": Pattern,
    "chain": Propagation,
    "store": StoreSettings,
    "windows": Partition,
    "retraining": Retraining,
}
MADE_LATER = ("loss", "module", "trainer")  # for each window; until then partial calls
SCHEDULE = ("precision", "max_epochs", "max_steps", "accumulate_grad_batches")  # what a run asks of its Trainer
NOT_REHEARSED = ("model", "data", "output_dir", "overwrite", "plan", "resume", "stop_after", "memory_limit", "seed")
COUNTS = ("data.num_samples", "data.num_held_out", "data.batch_size", "data.packing")  # of data: these are rehearsed
PACKAGE = Path(__file__).parents[1]
# In a wheel conf/ stands in the package; in a checkout next to it.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """What a configuration chooses, before it is looked at together.

    Attributes:
        call: Settings of the run itself.
        parts: The parts, by name; None for one that could not be made.
        trainer: Settings of the Trainer.
        fitting: Of the fit of every window; None if something is wrong with it.
        compute: Where it will compute; None if that cannot be said.
    """

    call: dict[str, Any]
    parts: dict[str, Any]
    trainer: dict[str, Any]
    fitting: FitSettings | None
    compute: Compute | None

    def method(self) -> Method:
        """The method, of parts that could all be made."""
        assert self.compute is not None and self.fitting is not None
        apart = prunes_apart(self.call["prune_by"], self.parts["chain"])
        return Method(
            criterion=self.parts["criterion"],
            pattern=self.parts["pattern"],
            windows=self.parts["windows"],
            propagation=self.parts["chain"],
            prune_by=self.call["prune_by"] if apart else "window",
            module=self.parts["module"],
            fitting=self.fitting,
            trainer=self.compute.trainers(without_strategy(self.parts["trainer"])),
            schedule=Schedule.from_trainer(self.trainer),
            allow_unscored=self.call["allow_unscored"],
            walk=self.call["walk"],
            retraining=self.parts["retraining"],
            retraining_trainer=self.compute.trainers(self.parts["trainer"]),
        )

    def execution(self, limit: int | None = None) -> Execution:
        """How it is carried out, with a limit of memory."""
        assert self.compute is not None
        return Execution(
            compute=self.compute,
            store=self.parts["store"],
            batch_size=self.parts["data"].batch_size,
            memory_limit=limit,
            stop_after=self.call["stop_after"],
            seed=self.call["seed"],
        )


def prepare(cfg: DictConfig) -> Job:
    """Build what a run needs and check it all, before any weight is loaded or any file written.

    Raises:
        ValueError: With every problem that could be found at once. What is raised while settings are looked at is its
            cause.
    """
    problems = Problems()
    problems.check(expand_home, cfg)
    chosen = _choose(cfg, problems)
    found = problems.check(folder_state, Path(chosen.call.get("output_dir", "")), about="output_dir: ")
    limit = _check_call(cfg, chosen.call, chosen.parts, problems)
    problems.raise_all()
    model, source, call = chosen.parts["model"], chosen.parts["data"], chosen.call
    with concerning(given_of("trainer")):
        method, execution = chosen.method(), chosen.execution(limit)
    with concerning(given_of("model")):
        model.check()
        skeleton = model.skeleton()
        check_model(skeleton, method)
    with concerning(given_of("module")):
        prepare_model(skeleton, method.module)
        check_module(method.module, skeleton, single=method.windows.by == WindowKind.MATRIX)
    if call["resume"] is None:  # that run was rehearsed when it began; what has changed since is refused
        _rehearse(chosen, skeleton)
    with concerning(given_of("model")):
        tokenizer = model.tokenizer()
    with concerning(given_of("data")):
        samples = make_samples(source, tokenizer, model, execution)
        check_samples(skeleton, samples)
    folder, store = Path(call["output_dir"]), execution.store
    shape = samples.shape(skeleton.config.get_text_config().hidden_size)
    with concerning(given_of("store")):
        store.check(folder / ACTIVATIONS, shape, num_arrays(method, store, ()), limit)
    output = Output(
        folder=folder,
        config=plain(cfg),
        resume=call["resume"] is not None,
        plan_only=call["plan"],
        found=found,
        named_by_time=_named_by_time(cfg),
    )
    return Job(
        model=model,
        tokenizer=tokenizer,
        source=source,
        samples=samples,
        method=method,
        execution=execution,
        output=output,
    )


def _choose(cfg: DictConfig, problems: Problems) -> _Chosen:
    """What a configuration chooses, with what is wrong added to the problems."""
    call = check_call(cfg, problems)
    parts = {name: _part(cfg, name, problems) for name in (*PARTS, *MADE_LATER)}
    trainer = _trainer_settings(cfg, problems)
    if parts["module"]:
        _join_groups(cfg.module, parts, problems)
    rates = parts["module"].keywords.pop("retry_rates", None) if parts["module"] else None  # of the fit, not of it
    own: dict[str, Any] = {"retry_rates": () if rates is None else rates}  # a module that is solved exactly has none
    own |= {name: call[name] for name in ("keep", "patience", "start") if name in call}
    fitting = problems.check(FitSettings, **own)
    looks_back = fitting and (fitting.keep, fitting.patience) != ("last", None)
    if parts["module"] and needs_gram(parts["module"]) and looks_back:
        problems.add(f"keep and patience: {callable_name(parts['module'])} is solved in one step; leave them out.")
    compute = None
    if trainer and "prune_by" in call:
        check_settings(
            problems,
            windows=parts["windows"],
            module=parts["module"],
            propagation=parts["chain"],
            store=parts["store"],
            prune_by=call["prune_by"],
            fitting=fitting,
            trainer=trainer,
            walk=call.get("walk", "local"),
            retraining=parts["retraining"],
        )
        if parts["trainer"]:
            made = parts["trainer"] if call.get("walk") == "local" else without_strategy(parts["trainer"])
            compute = problems.check(Compute.choose, made, trainer["precision"], about=f"{given_of('trainer')}: ")
    return _Chosen(call=call, parts=parts, trainer=trainer, fitting=fitting, compute=compute)


def _join_groups(node: DictConfig, parts: Mapping[str, Any], problems: Problems) -> None:
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


def _rehearse(chosen: _Chosen, skeleton: PreTrainedModel) -> None:
    """Rehearse a run; where that fails, find the setting without which it does not.

    Raises:
        ValueError: The first window would end with an exception, but not with the settings' defaults.
    """
    try:
        _rehearse_once(chosen, skeleton)
    except Exception as error:
        named = {name: name.startswith(NOT_REHEARSED) and name not in COUNTS for name in given()}
        words = [word for name, word in given().items() if not named[name]]
        others = [word for word in given().values() if word not in words]
        if not _passes(others, skeleton):
            log.warning("the rehearsal on a tiny model is left out: %s", in_words(error))
            return
        without = {word: [*others, *(one for one in words if one != word)] for word in reversed(words)}
        guilty = next((word for word, left in without.items() if _passes(left, skeleton)), " ".join(words))
        raise ValueError(
            f"{guilty}: a training step on a tiny model of this class ends in: {in_words(error).strip(' .')}. Expected "
            "what windows can be trained with; give another value or leave it out (HYDRA_FULL_ERROR=1 shows where)."
        ) from error


def _passes(words: Sequence[str], skeleton: PreTrainedModel) -> bool:
    """Whether a run with these words on its command line can be rehearsed."""
    problems = Problems()
    try:
        chosen = _choose(compose("fit", overrides=list(words)), problems)
        problems.raise_all()
        _rehearse_once(chosen, skeleton)
    except Exception:  # whatever the words that are left lead to
        return False
    return True


def _rehearse_once(chosen: _Chosen, skeleton: PreTrainedModel) -> None:
    source = chosen.parts["data"]
    rehearse(
        skeleton,
        chosen.method(),
        chosen.execution(),
        num_samples=source.num_samples,
        num_held_out=source.num_held_out,
        padded=source.packing != "fixed",
    )


def _part(cfg: DictConfig, name: str, problems: Problems) -> Any:
    """The object that a part of the configuration describes; None with what is wrong added to the problems.

    That of a part that is made for each window is a partial call.
    """
    node = cfg.get(name)
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


def _trainer_settings(cfg: DictConfig, problems: Problems) -> dict[str, Any]:
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


def _check_call(cfg: DictConfig, call: Mapping[str, Any], parts: Mapping[str, Any], problems: Problems) -> int | None:
    """Add what is wrong with the settings of the run itself; its limit of memory in bytes."""
    pattern = parts["pattern"]
    if "sparsity" in given() and "sparsity" in call and pattern and pattern.sparsity != call["sparsity"]:
        problems.add(
            f"sparsity={call['sparsity']} was given, but pattern={pattern.describe()} has a sparsity of its own, "
            f"{pattern.sparsity:g}; leave one of them out."
        )
    if parts["data"]:
        with_name = f"{given_of('data')}: "
        problems.check(parts["data"].check, about="" if "lit_recon" in type(parts["data"]).__module__ else with_name)
    if {"output_dir", "overwrite", "resume"} <= set(call) and call["resume"] is None:
        with_folder = f"output_dir={shortened(call['output_dir'], 100)}: "
        if _named_by_time(cfg):
            problems.check(check_writable, Path(call["output_dir"]), about=with_folder)
        else:
            problems.check(check_output, Path(call["output_dir"]), overwrite=call["overwrite"], about=with_folder)
    if all(parts.values()) and "output_dir" in call:
        problems.check(check_inputs, Path(call["output_dir"]), plain(cfg))
    if call.get("stop_after") is not None and call["stop_after"] < 1:
        problems.add(f"stop_after={call['stop_after']}: expected a number of windows, or null for all.")
    if "seed" in call and not 0 <= call["seed"] < 2**31:
        problems.add(f"seed={call['seed']}: expected a whole number from 0 to 2147483647.")
    if call.get("memory_limit") is None:
        return None
    return problems.check(parse_limit, call["memory_limit"])


def _named_by_time(cfg: DictConfig) -> bool:
    """Whether the output folder's name is made of the time."""
    return "${now:" in str(cfg._get_node("output_dir"))
