"""From the configuration to a Job: every part as an object, every problem in one message.

With parts.py, settings.py and resume_config.py the only file that sees the configuration.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig
from transformers import PreTrainedModel

from lit_recon.activations.store import Room
from lit_recon.data.source import Samples
from lit_recon.fit.checks import (
    check_model,
    check_module,
    check_retraining_samples,
    check_samples,
    check_settings,
    prunes_apart,
)
from lit_recon.fit.job import (
    Execution,
    Job,
    Method,
    Output,
    PruningMethod,
    Schedule,
    TrainingMethod,
    callable_name,
    num_arrays,
)
from lit_recon.fit.output.folder import ACTIVATIONS, check_output, check_writable, folder_state
from lit_recon.fit.output.inputs import check_inputs
from lit_recon.fit.output.push import check_push
from lit_recon.fit.parts import MADE_LATER, OPTIONAL, PARTS, join_groups, make_part, take_rules, trainer_settings
from lit_recon.fit.pruning_checks import check_pruning
from lit_recon.fit.rehearsal import rehearse
from lit_recon.fit.resume_config import committed
from lit_recon.fit.samples import make_samples
from lit_recon.fit.settings import CALL, PATHS
from lit_recon.model.precision import with_measured_precision
from lit_recon.model.windows import WindowKind
from lit_recon.modules.norms_biases import prepare_model
from lit_recon.modules.trained import needs_gram
from lit_recon.pruning.criteria.given import GivenMasks
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.settings.values import check_call, expand_home, given, given_of, plain
from lit_recon.system.command_line import Problems, concerning, in_words, shortened
from lit_recon.system.device import PRECISIONS, Compute, without_strategy
from lit_recon.system.memory import parse_limit

log = logging.getLogger(__name__)

NOT_REHEARSED = (
    "model",
    "data",
    "output_dir",
    "overwrite",
    "plan",
    "resume",
    "stop_after",
    "push",
    "memory_limit",
    "seed",
)
COUNTS = ("data.num_samples", "data.num_held_out", "data.batch_size", "data.packing")  # of data: these are rehearsed


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

    def in_precision_for(self, model: PreTrainedModel) -> "_Chosen":
        """The same with the precision that "auto" stands for: that of the run that is resumed, or the faster one."""
        if self.trainer["precision"] != "auto":
            return self
        assert self.compute is not None
        if self.call["resume"] is not None:
            begun_in = committed(Path(self.call["output_dir"]), "signature", "compute", "precision")
            if begun_in in PRECISIONS:
                return replace(self, compute=replace(self.compute, precision=begun_in))
        data = self.parts["data"]
        return replace(self, compute=with_measured_precision(self.compute, model, data.batch_size * data.length))

    def method(self) -> Method:
        """The method, of parts that could all be made."""
        assert self.compute is not None and self.fitting is not None
        apart = prunes_apart(self.call["prune_by"], self.parts["chain"])
        return Method(
            pruning=PruningMethod(
                criterion=self.parts["criterion"],
                pattern=self.parts["pattern"],
                prune_by=self.call["prune_by"] if apart else "window",
                allow_unscored=self.call["allow_unscored"],
                refinement=self.parts["refine"],
                rules=self.parts["rules"],
                allocation=self.parts["allocation"],
            ),
            training=TrainingMethod(
                module=self.parts["module"],
                fitting=self.fitting,
                trainer=self.compute.trainers(without_strategy(self.parts["trainer"])),
                schedule=Schedule.from_trainer(self.trainer),
                retraining=self.parts["retraining"],
                retraining_trainer=self.compute.trainers(self.parts["trainer"]),
            ),
            windows=self.parts["windows"],
            propagation=self.parts["chain"],
            walk=self.call["walk"],
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
            logged=self.parts["logger"],
        )


def prepare(cfg: DictConfig, *, samples_of: Callable[..., Samples] = make_samples) -> Job:
    """Build what a run needs and check it all, before any weight is loaded or any file written.

    Args:
        cfg: The composed configuration.
        samples_of: Makes the samples of a source of text.

    Raises:
        ValueError: With every problem that could be found at once. What is raised while settings are looked at is its
            cause.
    """
    problems = Problems()
    problems.check(expand_home, cfg, PATHS)
    chosen = _choose(cfg, problems)
    found = problems.check(folder_state, Path(chosen.call.get("output_dir", "")), about="output_dir: ")
    limit = _check_call(cfg, chosen.call, chosen.parts, problems)
    problems.raise_all()
    model, source, call = chosen.parts["model"], chosen.parts["data"], chosen.call
    with concerning(given_of("model")):
        model.check()
        skeleton = model.skeleton()
    chosen = chosen.in_precision_for(skeleton)
    with concerning(given_of("trainer")):
        method, execution = chosen.method(), chosen.execution(limit)
    with concerning(given_of("model")):
        check_model(skeleton, method)
    with concerning(given_of("module")):
        prepare_model(skeleton, method.training.module)
        check_module(method.training.module, skeleton, single=method.windows.by == WindowKind.MATRIX)
    if call["resume"] is None:  # that run was rehearsed when it began; what has changed since is refused
        _rehearse(chosen, skeleton)
    with concerning(given_of("model")):
        tokenizer = model.tokenizer()
    with concerning(given_of("data")):
        samples = samples_of(source, tokenizer, model, execution)
        check_samples(skeleton, samples)
    folder, store = Path(call["output_dir"]), execution.store
    shape = samples.shape(skeleton.config.get_text_config().hidden_size)
    with concerning(given_of("store")):
        room = Room(device=execution.compute.device, limit=limit)
        store.check(folder / ACTIVATIONS, shape, num_arrays(method, store, ()), room)
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
    call = check_call(cfg, problems, CALL, paths=PATHS)
    cfg, rules = take_rules(cfg, problems)
    parts = {name: make_part(cfg, name, problems) for name in (*PARTS, *MADE_LATER)}
    parts["rules"] = rules
    trainer = trainer_settings(cfg, problems)
    if parts["module"]:
        join_groups(cfg.module, parts, problems)
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
        check_pruning(
            problems,
            criterion=parts["criterion"],
            pattern=parts["pattern"],
            refinement=parts["refine"],
            rules=rules,
            allocation=parts["allocation"],
            propagation=parts["chain"],
            windows=parts["windows"],
            fitting=fitting,
        )
        if parts["trainer"]:
            made = parts["trainer"] if call.get("walk") == "local" else without_strategy(parts["trainer"])
            compute = problems.check(Compute.choose, made, trainer["precision"], about=f"{given_of('trainer')}: ")
    if compute and parts["store"]:
        problems.check(parts["store"].check_device, compute.device)
    return _Chosen(call=call, parts=parts, trainer=trainer, fitting=fitting, compute=compute)


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


def _check_call(cfg: DictConfig, call: Mapping[str, Any], parts: Mapping[str, Any], problems: Problems) -> int | None:
    """Add what is wrong with the settings of the run itself; its limit of memory in bytes."""
    pattern = parts["pattern"]
    is_number = isinstance(call.get("sparsity"), (int, float))
    if "sparsity" in given() and isinstance(parts["criterion"], GivenMasks):
        problems.add(f"sparsity with {given_of('criterion')}: masks are given, and so is how much goes; leave it out.")
    elif "sparsity" in given() and is_number and pattern and pattern.sparsity != call["sparsity"]:
        problems.add(
            f"sparsity={call['sparsity']} was given, but pattern={pattern.describe()} has a sparsity of its own, "
            f"{pattern.sparsity:g}; leave one of them out."
        )
    if parts["data"]:
        with_name = f"{given_of('data')}: "
        problems.check(parts["data"].check, about="" if "lit_recon" in type(parts["data"]).__module__ else with_name)
        problems.check(check_retraining_samples, parts["data"].num_retraining, call.get("walk", "global"))
    if {"output_dir", "overwrite", "resume"} <= set(call) and call["resume"] is None:
        with_folder = f"output_dir={shortened(call['output_dir'], 100)}: "
        if _named_by_time(cfg):
            problems.check(check_writable, Path(call["output_dir"]), about=with_folder)
        else:
            problems.check(check_output, Path(call["output_dir"]), overwrite=call["overwrite"], about=with_folder)
    if all(parts[name] for name in (*PARTS, *MADE_LATER) if name not in OPTIONAL) and "output_dir" in call:
        problems.check(check_inputs, Path(call["output_dir"]), plain(cfg))
    if call.get("stop_after") is not None and call["stop_after"] < 1:
        problems.add(f"stop_after={call['stop_after']}: expected a number of windows, or null for all.")
    if call.get("push") is not None:
        problems.check(check_push, call["push"])
    if "seed" in call and not 0 <= call["seed"] < 2**31:
        problems.add(f"seed={call['seed']}: expected a whole number from 0 to 2147483647.")
    if call.get("memory_limit") is None:
        return None
    return problems.check(parse_limit, call["memory_limit"])


def _named_by_time(cfg: DictConfig) -> bool:
    """Whether the output folder's name is made of the time."""
    return "${now:" in str(cfg._get_node("output_dir"))
