"""From the configuration to a Job: every part as an object, every problem in one message.

The only file that sees the configuration.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from lit_recon.fit.checks import check_model, check_module, check_samples, check_settings, prunes_apart
from lit_recon.fit.job import Execution, Job, Method, Output, Schedule, num_arrays
from lit_recon.fit.output.folder import ACTIVATIONS, NEXT_CONFIG, check_output, check_writable, folder_state
from lit_recon.fit.output.inputs import check_inputs
from lit_recon.fit.plan.memory_limit import parse_limit
from lit_recon.fit.signature import OF_ONE_CALL, OF_THE_CALL, differences
from lit_recon.model.partition import Partition
from lit_recon.model.windows import WindowKind
from lit_recon.system.cache import cache_folder
from lit_recon.system.command_line import Problems
from lit_recon.system.device import Compute

PARTS = ("model", "data", "criterion", "pattern", "chain", "store", "windows", "module", "trainer")
PACKAGE = Path(__file__).parents[1]
# In a wheel conf/ stands in the package; in a checkout next to it.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())
MOVED = {  # before version 0.3.0
    "lit_recon.modules.reconstruction.ReconstructionModule": "lit_recon.modules.masked_weights.MaskedWeights",
    "lit_recon.modules.least_squares.LeastSquaresModule": "lit_recon.modules.least_squares.LeastSquares",
    "lit_recon.criteria.wanda.Wanda": "lit_recon.pruning.criteria.wanda.Wanda",
    "lit_recon.criteria.magnitude.Magnitude": "lit_recon.pruning.criteria.magnitude.Magnitude",
    "lit_recon.masks.Unstructured": "lit_recon.pruning.patterns.Unstructured",
    "lit_recon.masks.NM": "lit_recon.pruning.patterns.NM",
    "lit_recon.losses.mean_squared": "lit_recon.modules.losses.mean_squared",
    "lit_recon.losses.mean_absolute": "torch.nn.functional.l1_loss in a function of your own",
    "lit_recon.models.HubModel": "lit_recon.model.loading.HubModel",
    "lit_recon.models.WheelModel": "lit_recon.model.wheels.WheelModel",
    "lit_recon.partition.Partition": "lit_recon.model.partition.Partition",
    "lit_recon.regime.Regime": "lit_recon.activations.propagation.Propagation",
    "lit_recon.store.StoreSettings": "lit_recon.activations.store.StoreSettings",
}

FOLDERS = {  # of modules that files of the user's own import from
    "activations": "activations.datamodule",
    "blocks": "model.decoder",
    "captured": "activations.matrix_inputs",
    "chain": "activations.chain",
    "criteria": "pruning.criteria",
    "halves": "model.halves",
    "losses": "modules.losses",
    "masks": "pruning.patterns",
    "matrices": "model.matrices",
    "models": "model.loading",
    "modules.reconstruction": "modules.masked_weights",
    "moments": "activations.gram",
    "packed_masks": "pruning.masks",
    "partition": "model.partition",
    "regime": "activations.propagation",
    "windows": "model.windows",
}


def prepare(cfg: DictConfig) -> Job:
    """Build what a run needs and check it all, before any weight is loaded or any file written.

    Raises:
        ValueError: With every problem that could be found at once.
    """
    problems = Problems()
    folder = Path(str(cfg.output_dir))  # a name of digits is read as a number
    found = folder_state(folder)
    retry_rates = _plain(OmegaConf.select(cfg, "module.retry_rates"))
    retry_rates = [] if retry_rates is None else retry_rates  # a module that is solved exactly has none
    parts = {name: _instantiate(cfg[name], name, problems) for name in PARTS}
    trainer = _plain(cfg.trainer)
    check_settings(
        problems,
        windows=parts["windows"],
        module=parts["module"],
        propagation=parts["chain"],
        store=parts["store"],
        prune_by=cfg.prune_by,
        retry_rates=retry_rates,
        trainer=trainer,
    )
    compute = _check_call(cfg, parts, problems)
    limit = None if cfg.memory_limit is None else problems.check(parse_limit, cfg.memory_limit)
    problems.raise_all()
    assert compute is not None
    model, source, store = parts["model"], parts["data"], parts["store"]
    method = _method(cfg, parts, compute, Schedule.from_trainer(trainer), retry_rates)
    execution = Execution(
        compute=compute,
        store=store,
        batch_size=cfg.data.batch_size,
        memory_limit=limit,
        stop_after=cfg.stop_after,
        seed=cfg.seed,
    )
    model.check()
    skeleton = model.skeleton()
    check_model(skeleton, method)
    check_module(method.module, skeleton, single=method.windows.by == WindowKind.MATRIX)
    tokenizer = model.tokenizer()
    samples = source.samples(tokenizer, seed=cfg.seed, cache=cache_folder())
    check_samples(skeleton, samples)
    shape = samples.shape(skeleton.config.get_text_config().hidden_size)
    store.check(folder / ACTIVATIONS, shape, num_arrays(method, store, ()), limit)
    output = Output(
        folder=folder,
        config=_plain(cfg),
        resume=cfg.resume is not None,
        plan_only=cfg.plan,
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


def _method(
    cfg: DictConfig, parts: Mapping[str, Any], compute: Compute, schedule: Schedule, retry_rates: list[float]
) -> Method:
    """The method, of parts that could all be made."""
    return Method(
        criterion=parts["criterion"],
        pattern=parts["pattern"],
        windows=parts["windows"],
        propagation=parts["chain"],
        prune_by=cfg.prune_by if prunes_apart(cfg.prune_by, parts["chain"]) else "window",
        module=parts["module"],
        retry_rates=tuple(retry_rates),
        trainer=compute.trainers(parts["trainer"]),
        schedule=schedule,
        allow_unscored=cfg.allow_unscored,
    )


def resumed(cfg: DictConfig) -> DictConfig:
    """The configuration of the run that `resume` names; those settings of this call that belong to the call replace it.

    Raises:
        ValueError: There is no run to resume, or a setting is given that differs.
    """
    folder = Path(str(cfg.resume))
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"resume={folder}: no run is there (no config.yaml); give the output_dir of an earlier run.")
    overwriting = (folder / NEXT_CONFIG).is_file()  # it ended before it had begun to
    if (folder / "results.json").is_file() and not overwriting:
        raise ValueError(f"resume={folder}: that run is finished; its numbers are in {folder / 'results.json'}.")
    before = OmegaConf.create(OmegaConf.load(folder / (NEXT_CONFIG if overwriting else "config.yaml")))
    assert isinstance(before, DictConfig)
    given = {key.split("/")[0] for key in _given()} - {*OF_THE_CALL}
    now = {key: OmegaConf.select(cfg, key) for key in given}
    changed = [
        f"{where} is {old!r} there and {new!r} here"
        for key in sorted(given)
        for where, old, new in differences(_plain(OmegaConf.select(before, key)), _plain(now[key]), key)
    ]
    if changed:
        raise ValueError(f"resume={folder}: {'; '.join(changed)}. Leave that out, or start a new run.")
    for key in OF_THE_CALL:
        if key in _given() or key in OF_ONE_CALL:
            OmegaConf.update(before, key, cfg[key])
    OmegaConf.update(before, "output_dir", str(folder))
    if overwriting:
        before.resume, before.overwrite = None, True
    return before


def _instantiate(node: DictConfig, name: str, problems: Problems) -> Any:
    """The object that a configuration node describes, or None with what is wrong added to the problems."""
    target = str(node.get("_target_", ""))
    unresolved = OmegaConf.to_container(node, resolve=False)
    if replaced := [(key, old) for key, old in _targets(unresolved, name) if old in MOVED]:
        for key, old in replaced:
            problems.add(f"{key}={old} has moved; use {MOVED[old]}.")
        return None
    try:
        made = instantiate(node, _convert_="all")
        if name == "module" and isinstance(made, partial):
            made.keywords.pop("retry_rates", None)  # a setting of the fit, not of the module
        return made
    except MissingMandatoryValue as error:
        problems.add(f"{error.full_key or name} has no value; give {error.full_key or name}=<value>.")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, MissingMandatoryValue):
            problems.add(f"{cause.full_key} has no value; give {cause.full_key}=<value>.")
        elif isinstance(cause, ImportError):
            reason = " ".join(str(cause).split())
            moved = [
                f"lit_recon.{a} is lit_recon.{b} now. " for a, b in FOLDERS.items() if f"'lit_recon.{a}'" in reason
            ]
            problems.add(
                f"{name}._target_={target}: cannot be imported ({reason}). {''.join(moved)}Expected <file>.<class>, "
                "where the file is in the working directory or the package is installed."
            )
        elif isinstance(cause, (ValueError, TypeError)):
            problems.add(str(cause) if isinstance(cause, ValueError) else f"{name}: {cause}")
        else:
            problems.add(f"{name}: {error}")
    return None


def _targets(node: Any, name: str) -> Iterator[tuple[str, str]]:
    """The dotted paths in a configuration, with the settings that give them."""
    for key, value in node.items():
        if key == "_target_":
            yield f"{name}._target_", str(value)
        elif isinstance(value, dict):
            yield from _targets(value, f"{name}.{key}")


def _check_call(cfg: DictConfig, parts: Mapping[str, Any], problems: Problems) -> Compute | None:
    """Add what is wrong with the settings of the run itself; where it will compute."""
    pattern = parts["pattern"]
    if "sparsity" in _given() and pattern and pattern.sparsity != cfg.sparsity:
        problems.add(
            f"sparsity={cfg.sparsity} was given, but pattern={pattern.describe()} has a sparsity of its own, "
            f"{pattern.sparsity:g}; leave one of them out."
        )
    if not isinstance(parts["windows"], Partition | None):
        problems.add(f"windows._target_={cfg.windows._target_}: expected lit_recon.model.partition.Partition.")
    if parts["data"]:
        problems.check(parts["data"].check)
    folder = Path(str(cfg.output_dir))
    if _named_by_time(cfg) and cfg.resume is None:
        problems.check(check_writable, folder)
    elif cfg.resume is None:
        problems.check(check_output, folder, overwrite=cfg.overwrite)
    if all(parts.values()):
        problems.check(check_inputs, folder, _plain(cfg))
    if cfg.stop_after is not None and not (type(cfg.stop_after) is int and cfg.stop_after > 0):
        problems.add(f"stop_after={cfg.stop_after}: expected a number of windows, or null for all.")
    if not (type(cfg.seed) is int and 0 <= cfg.seed < 2**31):
        problems.add(f"seed={cfg.seed}: expected a whole number from 0 to 2147483647.")
    for name in ("overwrite", "allow_unscored", "plan"):
        if type(cfg[name]) is not bool:
            problems.add(f"{name}={cfg[name]}: expected true or false.")
    trainer = parts["trainer"]
    if not isinstance(trainer, partial):
        return None
    return problems.check(Compute.choose, trainer, cfg.trainer.precision, about="trainer: ")


def _named_by_time(cfg: DictConfig) -> bool:
    """Whether the output folder's name is made of the time."""
    return "${now:" in str(cfg._get_node("output_dir"))


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _given() -> set[str]:
    """The settings that the command line gives."""
    return {override.partition("=")[0].lstrip("+~") for override in HydraConfig.get().overrides.task}
