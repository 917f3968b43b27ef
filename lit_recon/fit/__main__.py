"""python -m lit_recon.fit: prune a language model and reconstruct it window by window. --help explains.

    prepare: the configuration becomes objects, and everything that can be wrong is found     -> exit status 2
    run:     load, plan, walk, save, read back, evaluate, report

The only file that sees the configuration.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from lightning import LightningModule
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler

from lit_recon.activations.matrix_inputs import check_regime
from lit_recon.activations.propagation import Regime
from lit_recon.activations.store import check_targets, count_arrays
from lit_recon.data.source import Samples
from lit_recon.fit.job import ACTIVATIONS, Job
from lit_recon.fit.output.folder import NEXT_CONFIG, check_output, finish
from lit_recon.fit.plan.estimate import Workload
from lit_recon.fit.plan.memory_limit import parse_limit
from lit_recon.fit.run import run
from lit_recon.fit.signature import OF_ONE_CALL, OF_THE_CALL, differences
from lit_recon.fit.sweep import fit_apart
from lit_recon.model.partition import Partition, layer_windows
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.patterns import Pattern
from lit_recon.reconstruction.window_fit import uses_moments
from lit_recon.system.cache import cache_folder
from lit_recon.system.command_line import (
    Problems,
    Refusal,
    check_module,
    check_optimizer,
    check_pattern,
    check_steps,
    explain_override,
    quiet,
    stop,
)
from lit_recon.system.commits import CommitError
from lit_recon.system.device import Compute

PARTS = ("model", "data", "criterion", "pattern", "chain", "store", "windows", "module", "trainer")
PRUNE_BY = ("window", "half", "block", "model")
PACKAGE = Path(__file__).parents[1]
# In a wheel conf/ stands in the package; in a checkout beside it.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())


def prepare(cfg: DictConfig) -> Job:
    """Build what a run needs and check it all, before any weight is loaded or any file written.

    Raises:
        ValueError: With every problem that could be found at once.
    """
    problems = Problems()
    parts = {name: problems.instantiate(cfg[name], name) for name in PARTS}
    compute = _check_parts(cfg, parts, problems)
    _check_settings(cfg, problems)
    limit = None if cfg.memory_limit is None else problems.check(parse_limit, cfg.memory_limit)
    problems.raise_all()
    assert compute is not None
    model, source, criterion, pattern, regime, store, windows, module, trainer = parts.values()
    model.check()
    skeleton = model.skeleton()
    windows.check(skeleton)
    layers = layer_windows(skeleton)
    matrices = [matrix for layer in layers for matrix in layer.matrices()]
    check_pattern(matrices, pattern)
    check_module(module, layers[0], single=windows.by == "matrix")
    if windows.by == "matrix":
        check_regime([matrix for matrix in matrices if matrix.input_dim is not None], regime)
    tokenizer = model.tokenizer()
    samples = source.samples(tokenizer, seed=cfg.seed, cache=cache_folder())
    output = Path(str(cfg.output_dir))  # a name of digits is read as a number
    units = cfg.prune_by if _has_units(cfg, regime) else "window"
    least = count_arrays(regime, store.targets, kind=windows.by, overlapping=windows.overlapping, units=units)
    store.check(output / ACTIVATIONS, samples.shape(skeleton.config.get_text_config().hidden_size), least, limit)
    return Job(
        model=model,
        tokenizer=tokenizer,
        source=source,
        samples=samples,
        criterion=criterion,
        pattern=pattern,
        regime=regime,
        store=store,
        windows=windows,
        batch_size=cfg.data.batch_size,
        memory_limit=limit,
        units=units,
        allow_unscored=cfg.allow_unscored,
        module=module,
        trainer=compute.trainers(trainer),
        compute=compute,
        workload=_workload(cfg, samples, module),
        recipe=_recipe(cfg, criterion, pattern, windows, regime),
        output=output,
        config=_plain(cfg),
        seed=cfg.seed,
        plan_only=cfg.plan,
        stream=cfg.stream,
        stop_after=cfg.stop_after,
        resume=cfg.resume is not None,
    )


def _check_parts(cfg: DictConfig, parts: dict[str, Any], problems: Problems) -> Compute | None:
    """Note what is wrong with the parts that could be built, alone and together; where the run will compute."""
    source, pattern, store, module, trainer = (
        parts[name] for name in ("data", "pattern", "store", "module", "trainer")
    )
    if "sparsity" in _given() and pattern and pattern.sparsity != cfg.sparsity:
        problems.add(
            f"sparsity={cfg.sparsity} was given, but pattern={pattern.describe()} has a sparsity of its own, "
            f"{pattern.sparsity:g}; leave one of them out."
        )
    if isinstance(module, partial):
        clipped = cfg.trainer.gradient_clip_val if cfg.trainer.precision == "16-mixed" else None
        check_optimizer(module, problems, clipped=clipped)
    if cfg.trainer.get("logger") is not None:
        problems.add("trainer.logger: a run has one log for all windows, TensorBoard's; leave it out.")
    if not isinstance(parts["windows"], Partition | None):
        problems.add(f"windows._target_={cfg.windows._target_}: expected lit_recon.model.partition.Partition.")
    if source:
        problems.check(source.check)
    if uses_moments(module) and cfg.windows.by != "matrix":
        problems.add(
            f"{_class(cfg.module)} (module=least_squares) solves for single matrices; use windows=matrix, not "
            f"{cfg.windows.by}."
        )
    if parts["chain"] and _has_units(cfg, parts["chain"]) and (cfg.windows.by, cfg.prune_by) == ("matrix", "half"):
        problems.add(
            "prune_by=half with windows=matrix and chain.statistics=sparse: single matrices are pruned in layers that "
            "stay dense; use window, block or model."
        )
    if store:
        problems.check(check_targets, cfg.windows.by, store.targets)
    return problems.check(Compute.choose, trainer, cfg.trainer.precision, about="trainer: ") if trainer else None


def _check_settings(cfg: DictConfig, problems: Problems) -> None:
    """Note what is wrong with the settings of the run itself."""
    if cfg.resume is None:
        problems.check(check_output, Path(str(cfg.output_dir)), overwrite=cfg.overwrite)
    if cfg.stop_after is not None and not (type(cfg.stop_after) is int and cfg.stop_after > 0):
        problems.add(f"stop_after={cfg.stop_after}: expected a number of windows, or null for all.")
    if not (type(cfg.seed) is int and 0 <= cfg.seed < 2**31):
        problems.add(f"seed={cfg.seed}: expected a whole number from 0 to 2147483647.")
    problems.check(check_steps, cfg.trainer.max_epochs, cfg.trainer.max_steps, cfg.trainer.accumulate_grad_batches)
    for name in ("overwrite", "allow_unscored", "plan", "stream"):
        if type(cfg[name]) is not bool:
            problems.add(f"{name}={cfg[name]}: expected true or false.")
    if cfg.prune_by not in PRUNE_BY:
        problems.add(f"prune_by={cfg.prune_by}: expected one of {', '.join(PRUNE_BY)}.")


def _has_units(cfg: DictConfig, regime: Regime) -> bool:
    """Whether it makes a difference that something else than each window is pruned at once."""
    return cfg.prune_by != "window" and regime.statistics == "sparse"


def _resumed(cfg: DictConfig) -> DictConfig:
    """The configuration of the run that `resume` names; those settings of this call that belong to the call replace it.

    Raises:
        ValueError: There is no run to go on with, or a setting is given that differs.
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


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _given() -> set[str]:
    """The settings that the command line gives."""
    return {override.partition("=")[0].lstrip("+~") for override in HydraConfig.get().overrides.task}


def _recipe(
    cfg: DictConfig, criterion: Criterion, pattern: Pattern, windows: Partition, regime: Regime
) -> dict[str, str]:
    """What was done, in the words of the settings."""
    recipe = {
        "criterion": type(criterion).__name__,
        "pattern": pattern.describe(),
        "windows": windows.describe(),
        "module": _class(cfg.module),
        **regime.describe(),
        "epochs": str(cfg.trainer.max_epochs),
        "batch_size": str(cfg.data.batch_size),
    }
    rate = OmegaConf.select(cfg, "module.optimizer.lr")
    return recipe | ({"learning_rate": f"{rate:g}"} if rate is not None else {})


def _class(node: DictConfig) -> str:
    """Name of the class that a configuration node is about."""
    return node._target_.rpartition(".")[2]


def _workload(cfg: DictConfig, samples: Samples, module: Callable[..., LightningModule]) -> Workload:
    return Workload(
        epochs=cfg.trainer.max_epochs,
        max_steps=cfg.trainer.max_steps,
        accumulate=cfg.trainer.accumulate_grad_batches,
        evaluation_tokens=samples.evaluation_ST.numel(),
        uses_moments=uses_moments(module),
    )


def _fit(cfg: DictConfig) -> None:
    """Prepare and run; how a run ends is told in one message."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
    quiet()
    go_on = f"go on with resume={cfg.resume}" if cfg.resume else "nothing was written."
    try:
        if cfg.resume is not None and finish(Path(str(cfg.resume)), console):
            return
        try:
            job = prepare(cfg if cfg.resume is None else _resumed(cfg))
        except ValueError as error:
            raise Refusal(str(error)) from error
        go_on = f"go on with resume={job.output}"
        run(job, console)
    except Refusal as error:
        stop(str(error), status=2)
    except CommitError as error:
        stop(str(error), status=1)
    except KeyboardInterrupt as interrupt:
        stop(f"interrupted: {str(interrupt) or go_on}", status=1)


def main() -> None:
    """The command line; Hydra composes the configuration, one for each run of a sweep."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what is wrong instead of printing it and exiting with 1
    ended: dict[str, int] = {}

    def task(cfg: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            fit_apart(ended)
        else:
            _fit(cfg)

    with tempfile.TemporaryDirectory() as scratch:
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


if __name__ == "__main__":
    main()
