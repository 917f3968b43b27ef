"""python -m lit_recon.fit: prune a language model and reconstruct it window by window. --help explains.

    prepare: the configuration becomes objects, and everything that can be wrong is found     -> exit status 2
    run:     load, plan, walk, save, read back, evaluate, report

The only file that sees the configuration.
"""

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler

from lit_recon.cache import cache_folder
from lit_recon.compute import Compute
from lit_recon.criteria import Criterion
from lit_recon.data.source import Samples
from lit_recon.job import Job, run
from lit_recon.masks import Pattern
from lit_recon.partition import check_partition, layer_windows
from lit_recon.plan import Workload
from lit_recon.regime import Regime
from lit_recon.startup import Problems, Refusal, check_output, check_pattern, check_steps, explain_override, quiet

REFUSED = 2  # exit status: the user asked for something that cannot be
CONF = Path(__file__).parent / "conf"  # in a wheel; in a checkout it stands beside the package
CONF = CONF if CONF.is_dir() else Path(__file__).parent.parent / "conf"


def prepare(cfg: DictConfig) -> Job:
    """Build what a run needs and check it all, before any weight is loaded or any file written.

    Raises:
        ValueError: With every problem that could be found at once.
    """
    problems = Problems()
    names = ("model", "data", "criterion", "pattern", "chain", "windows", "module", "trainer")
    model, source, criterion, pattern, regime, make_windows, module, trainer = (
        problems.instantiate(cfg[name], name) for name in names
    )
    output = Path(cfg.output_dir)
    problems.check(check_output, output, overwrite=cfg.overwrite)
    if "sparsity" in _given() and pattern and pattern.sparsity != cfg.sparsity:
        problems.add(
            f"sparsity={cfg.sparsity} was given, but pattern={pattern.describe()} has a sparsity of its own, "
            f"{pattern.sparsity:g}; leave one of them out."
        )
    if isinstance(module, partial) and "optimizer" in module.keywords:  # a dry run finds bad rates and unknown options
        parameters = [torch.nn.Parameter(torch.zeros(1))]
        problems.check(module.keywords["optimizer"], parameters, about="module.optimizer: ")
    compute = problems.check(Compute.choose, trainer, cfg.trainer.precision, about="trainer: ") if trainer else None
    problems.check(check_steps, cfg.trainer.max_epochs, cfg.trainer.max_steps, cfg.trainer.accumulate_grad_batches)
    if source:
        problems.check(source.check)
    problems.check(check_combination, cfg)
    problems.raise_all()
    assert compute is not None
    model.check()
    skeleton = model.skeleton()
    check_partition(skeleton, **make_windows.keywords)
    check_pattern([matrix for window in layer_windows(skeleton) for matrix in window.matrices()], pattern)
    tokenizer = model.tokenizer()
    samples = source.samples(tokenizer, seed=cfg.seed, cache=cache_folder())
    return Job(
        model=model,
        tokenizer=tokenizer,
        source=source,
        samples=samples,
        criterion=criterion,
        pattern=pattern,
        regime=regime,
        windows=make_windows,
        kind=cfg.windows.by,
        size=cfg.windows.get("size", 4),
        units=None if cfg.prune_by == "window" else partial(layer_windows, by=cfg.prune_by),
        allow_unscored=cfg.allow_unscored,
        module=module,
        trainer=partial(trainer, precision=compute.precision, accelerator=compute.device.type),
        compute=compute,
        workload=_workload(cfg, samples),
        recipe=_recipe(cfg, criterion, pattern, regime),
        output=output,
        config=OmegaConf.to_yaml(cfg, resolve=True),
        seed=cfg.seed,
        plan_only=cfg.plan,
    )


def _given() -> set[str]:
    """The settings that the command line gives."""
    return {override.partition("=")[0].lstrip("+~") for override in HydraConfig.get().overrides.task}


def _recipe(cfg: DictConfig, criterion: Criterion, pattern: Pattern, regime: Regime) -> dict[str, str]:
    """What was done, in the words of the settings."""
    recipe = {
        "criterion": type(criterion).__name__,
        "pattern": pattern.describe(),
        "windows": _describe_windows(cfg.windows),
        "module": cfg.module._target_.rpartition(".")[2],
        **regime.describe(),
        "epochs": str(cfg.trainer.max_epochs),
        "batch_size": str(cfg.data.batch_size),
    }
    rate = OmegaConf.select(cfg, "module.optimizer.lr")
    return recipe | ({"learning_rate": f"{rate:g}"} if rate is not None else {})


def _describe_windows(windows: DictConfig) -> str:
    size = f" of {windows.size}" if "size" in windows else ""
    stride = f" every {windows.stride}" if windows.get("stride") else ""
    return windows.by + size + stride + (", logits at the end" if windows.get("head") else "")


def check_combination(cfg: DictConfig) -> None:
    """Raise a ValueError for settings that are right by themselves but mean nothing together."""
    problems = []
    if cfg.module._target_.endswith("LeastSquaresModule") and cfg.windows.by != "matrix":
        problems.append(f"module=least_squares solves for single matrices; use windows=matrix, not {cfg.windows.by}.")
    units = ("window", "half", "block", "model")
    if cfg.prune_by not in units:
        problems.append(f"prune_by={cfg.prune_by}: expected one of {', '.join(units)}.")
    if problems:
        raise ValueError("\n".join(problems))


def _workload(cfg: DictConfig, samples: Samples) -> Workload:
    return Workload(
        epochs=cfg.trainer.max_epochs,
        max_steps=cfg.trainer.max_steps,
        accumulate=cfg.trainer.accumulate_grad_batches,
        evaluation_tokens=samples.evaluation_ST.numel(),
        uses_moments=cfg.module._target_.endswith("LeastSquaresModule"),
    )


_refused: list[int] = []  # statuses of the runs of a sweep that were refused; the others go on


def _fit(cfg: DictConfig) -> None:
    """One run; of a sweep, a refusal is remembered and the next run begins."""
    try:
        _run(cfg)
    except SystemExit as end:
        if HydraConfig.get().mode is not RunMode.MULTIRUN or end.code != REFUSED:
            raise
        _refused.append(REFUSED)


def _run(cfg: DictConfig) -> None:
    """Prepare and run; how a run ends is told in one message."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
    quiet()
    try:
        job = prepare(cfg)
    except ValueError as error:
        _stop(str(error), status=REFUSED)
    except KeyboardInterrupt:
        _stop("interrupted: nothing was written.", status=1)
    try:
        run(job, console)
    except Refusal as error:
        _stop(str(error), status=REFUSED)
    except KeyboardInterrupt as interrupt:
        kept = "its checkpoint is whole" if (job.output / "checkpoint").is_dir() else "nothing is kept"
        _stop(f"interrupted: {str(interrupt) or f'{job.output} is unfinished; {kept}'}.", status=1)


def _stop(message: str, *, status: int) -> NoReturn:
    sys.stderr.write(message + "\n")
    raise SystemExit(status)


def main() -> None:
    """The command line; Hydra composes the configuration."""
    _refused.clear()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what is wrong instead of printing it and exiting with 1
    try:
        hydra.main(config_path=str(CONF.resolve()), config_name="fit", version_base="1.3")(_fit)()
    except (HydraException, OmegaConfBaseException) as error:
        _stop(explain_override(error, sys.argv[1:], CONF), status=REFUSED)
    if _refused:
        _stop(f"refused runs of the sweep: {len(_refused)}; see above.", status=REFUSED)


if __name__ == "__main__":
    main()
