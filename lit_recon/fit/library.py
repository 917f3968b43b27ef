"""The library: prune and reconstruct a model object in place, from a script or a notebook.

It opens a session and walks over it by the same functions as the command; what the command writes to files it returns.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import StoreSettings
from lit_recon.data.packing import PADDING
from lit_recon.data.source import Samples
from lit_recon.fit.checks import check_module, check_retraining_samples, check_samples, check_settings, prunes_apart
from lit_recon.fit.job import Execution, Method, PruningMethod, Schedule, TrainingMethod
from lit_recon.fit.output.library_run import Reconstruction
from lit_recon.fit.pruning_checks import check_pruning
from lit_recon.fit.rehearsal import rehearse
from lit_recon.fit.session import open_session, reconstruct
from lit_recon.fit.walk_callbacks import ProgressBar
from lit_recon.model.named import model_named
from lit_recon.model.partition import Partition
from lit_recon.model.precision import with_measured_precision
from lit_recon.model.windows import Window, WindowKind
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.modules.norms_biases import prepare_model
from lit_recon.pruning.allocation.rules import Rules
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.masks import Masks
from lit_recon.pruning.patterns import Pattern, Unstructured
from lit_recon.pruning.refine import Refinement
from lit_recon.pruning.survey import Allocation
from lit_recon.reconstruction.driver import WalkCallback
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.reconstruction.retraining import Retraining
from lit_recon.reconstruction.window_result import WindowResult
from lit_recon.system.command_line import Problems, in_words, shortened
from lit_recon.system.console import Console
from lit_recon.system.device import Compute
from lit_recon.system.quiet_libraries import quietly
from lit_recon.system.signals import stoppable

log = logging.getLogger(__name__)

TRAINER: dict[str, Any] = {  # conf/fit.yaml
    "accelerator": "auto",
    "devices": 1,
    "precision": "auto",
    "max_epochs": 1,
    "max_steps": -1,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "log_every_n_steps": 2,
    "val_check_interval": 0.5,
    "num_sanity_val_steps": -1,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


def load(
    name: str, *, revision: str | None = None, dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model and its tokenizer.

    Args:
        name: Hub id or folder; or a member of conf/model that needs no Hub, such as smollm2 or gemma3_270m.
        revision: Branch, tag or commit of a Hub model.
        dtype: Of the weights: "float32", "bfloat16" or "float16"; None: the checkpoint's own.

    Returns:
        The model on the CPU, in evaluation mode and without gradients, and its tokenizer.

    Raises:
        ValueError: It cannot be found or read; the message says what to do.
    """
    source = model_named(name, revision=revision, dtype=dtype)
    source.check()
    return source.load(), source.tokenizer()


def prune_and_reconstruct(
    model: PreTrainedModel,
    samples: Samples,
    *,
    criterion: Criterion | None = None,
    pattern: Pattern | None = None,
    refinement: Refinement | None = None,
    allocation: Rules | Allocation | None = None,
    windows: Partition | None = None,
    propagation: Propagation | None = None,
    prune_by: str = "window",
    module: Callable[..., LightningModule] = MaskedWeights,
    fitting: FitSettings | None = None,
    walk: str = "local",
    retraining: Retraining | None = None,
    trainer: Mapping[str, Any] | None = None,
    store: StoreSettings | None = None,
    batch_size: int = 2,
    allow_unscored: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Reconstruction:
    """Prune a model and reconstruct it window by window, in place (arXiv 2510.14444).

    Defaults are the command's. When it is interrupted, the windows that are done stay, and the rest is dense.

    Args:
        model: A causal language model of transformers, of any floating dtype; its weights are changed in place.
        samples: Calibration and held-out samples of a source of text.
        criterion: Scores weights; Wanda.
        pattern: Turns scores into masks; half of each row.
        refinement: Refines masks, such as pruning.refine.swaps.Swaps(); none.
        allocation: Shares the sparsity out (pruning.allocation.owl.Owl()), or patterns by name (rules.Rules); none.
        windows: What is reconstructed at once; blocks.
        propagation: What windows see; sparse inputs, dense targets and statistics.
        prune_by: What is pruned at once: "window", "half", "block" or "model"; differs with sparse statistics only.
        module: Makes a window's LightningModule from (window, masks, unit); partial(MaskedWeights, ...), for example.
        fitting: How windows are tried, and what is kept.
        walk: "local": by windows; "global": all layers at once, pruned; "local_then_global".
        retraining: How all layers are trained at once; Retraining(), by the divergence of the logits.
        trainer: Arguments of lightning.Trainer that differ from TRAINER, such as {"max_epochs": 4}.
        store: Where hidden states are kept; in memory where they fit, else in a temporary folder.
        batch_size: Samples per batch.
        allow_unscored: Whether matrices may stay dense that the criterion cannot score.
        seed: Of everything that is drawn.
        progress: Whether a progress bar is shown, on a terminal or in a notebook.

    Returns:
        Results and masks.

    Raises:
        ValueError: What the command refuses; a number is not finite, with windows before it done.
    """
    given: dict[str, Any] = {"criterion": criterion, "pattern": pattern, "windows": windows, "propagation": propagation}
    given |= {"fitting": fitting, "retraining": retraining, "refinement": refinement, "allocation": allocation}
    given |= {"prune_by": prune_by, "module": module, "allow_unscored": allow_unscored, "walk": walk}
    parts, settings = _parts() | _given(given), TRAINER | dict(trainer or {})
    asked = (parts, settings, store or StoreSettings(kind="auto"), batch_size, seed)
    with _prepared(model), quietly(), stoppable():
        return _walk(model, samples, asked, shown=progress)


def _given(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts that are given; rules are one of their own."""
    given = {name: part for name, part in parts.items() if part is not None}
    if isinstance(given.get("allocation"), Rules):
        given["rules"] = given.pop("allocation")
    return given


def _parts() -> dict[str, Any]:
    """The method of the command's defaults, but for its trainer."""
    return {
        "criterion": Wanda(),
        "pattern": Unstructured(sparsity=0.5),
        "refinement": None,
        "rules": None,
        "allocation": None,
        "windows": Partition(),
        "propagation": Propagation(),
        "prune_by": "window",
        "module": MaskedWeights,
        "fitting": FitSettings(),
        "walk": "local",
        "retraining": Retraining(),
        "allow_unscored": False,
    }


_Asked = tuple[dict[str, Any], dict[str, Any], StoreSettings, int, int]  # the arguments of _checked


def _walk(model: PreTrainedModel, samples: Samples, asked: _Asked, *, shown: bool) -> Reconstruction:
    """Open a session and walk over it."""
    method, execution = _checked(*asked)
    if asked[1]["precision"] == "auto":
        compute = with_measured_precision(
            execution.compute, model, execution.batch_size * samples.calibration_ST.shape[1]
        )
        asked = (asked[0], asked[1] | {"precision": compute.precision}, *asked[2:])
        method, execution = _checked(*asked)
    prepare_model(model, method.training.module)
    check_module(method.training.module, model, single=method.windows.by == WindowKind.MATRIX)
    check_samples(model, samples)
    check_retraining_samples(0 if samples.retraining_ST is None else len(samples.retraining_ST), method.walk)
    _rehearse(model, samples, asked)
    masks = _KeptMasks()
    with TemporaryDirectory() as activations:
        session = open_session(model, samples, method, execution, activations=Path(activations))
        bar = ProgressBar(Console(), session.num_fits, shown=shown)
        try:
            with session.chain.passes.store, bar:
                results = reconstruct(
                    session, method, execution, masks.masks, callbacks=[masks, bar], trainer_callbacks=[bar]
                )
        finally:
            session.weights.discard()
    recipe, labels = method.recipe(execution.batch_size), session.pruner.labels("magnitude")
    return Reconstruction(results, masks.masks, labels, recipe, session.clock.summary(), execution.seed)


def _rehearse(model: PreTrainedModel, samples: Samples, asked: _Asked) -> None:
    """Rehearse the first window, before a weight is changed; where that fails, name the argument to blame.

    Raises:
        ValueError: It would end with an exception, but not with the default settings.
    """
    counts: dict[str, Any] = {"num_samples": len(samples.calibration_ST), "num_held_out": len(samples.held_out_ST)}
    both = [one for one in (samples.calibration_ST, samples.retraining_ST) if one is not None]
    counts["padded"] = any(bool((one == PADDING).any()) for one in both)

    def failure(*asked: Any) -> Exception | None:
        try:
            rehearse(model, *_checked(*asked), **counts)
        except Exception as error:  # whatever would end the first window
            return error
        return None

    if (error := failure(*asked)) is None:
        return
    parts, settings, store, batch_size, seed = asked
    if failure(_parts(), TRAINER, store, 2, 0):  # it is the tiny model
        log.warning("the rehearsal on a tiny model is left out: %s", in_words(error))
        return
    without: dict[str, _Asked] = {f"batch_size={batch_size}": (parts, settings, store, 2, seed)}
    for name, default in ((name, default) for name, default in _parts().items() if parts[name] != default):
        without[f"{name}={parts[name]!r}"] = (parts | {name: default}, settings, store, batch_size, seed)
    for key in (key for key in settings if settings[key] != TRAINER.get(key)):
        others = TRAINER | {other: value for other, value in settings.items() if other != key}
        given = {key: settings[key]}
        without[f"trainer={given}"] = (parts, others, store, batch_size, seed)
    guilty = next((word for word, others in without.items() if failure(*others) is None), "these arguments together")
    raise ValueError(
        f"{shortened(guilty, 200)}: a training step on a tiny model of this class ends in: "
        f"{in_words(error).strip(' .')}. Expected what windows can be trained with; give another value or leave it out."
    ) from error


class _KeptMasks(WalkCallback):
    """Keeps the masks of all windows."""

    def __init__(self) -> None:
        self.masks = Masks()

    def on_window_end(self, window: Window, masks: Mapping[str, Tensor], results: Sequence[WindowResult]) -> None:
        """Pack the masks of a window that is done."""
        self.masks.update(Masks.pack(masks))


def _checked(
    parts: dict[str, Any], settings: dict[str, Any], store: StoreSettings, batch_size: int, seed: int
) -> tuple[Method, Execution]:
    """A method and its execution.

    Args:
        parts: Of the method, but for its trainer and schedule.
        settings: Arguments of the Trainer.
        store: Where hidden states are kept.
        batch_size: Samples per batch.
        seed: Of everything that is drawn.

    Raises:
        ValueError: They do not fit each other.
    """
    problems, make = Problems(), partial(Trainer, **settings)
    related = {
        name: parts[name] for name in ("windows", "module", "propagation", "prune_by", "fitting", "walk", "retraining")
    }
    check_settings(problems, **related, store=store, trainer=settings)
    pruning = ("criterion", "pattern", "refinement", "rules", "allocation", "propagation", "windows", "fitting")
    check_pruning(problems, **{name: parts[name] for name in pruning})
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            problems.add(f"{name}={value!r}: expected a whole number, {least} or more.")
    compute = problems.check(Compute.choose, make, settings["precision"], about="trainer: ")
    if compute:
        problems.check(store.check_device, compute.device)
    problems.raise_all()
    apart = prunes_apart(parts["prune_by"], parts["propagation"])
    in_pruning = ("criterion", "pattern", "allow_unscored", "refinement", "rules", "allocation")
    in_training = ("module", "fitting", "retraining")
    method = Method(
        pruning=PruningMethod(
            **{name: parts[name] for name in in_pruning}, prune_by=parts["prune_by"] if apart else "window"
        ),
        training=TrainingMethod(
            **{name: parts[name] for name in in_training},
            trainer=compute.trainers(make),
            schedule=Schedule.from_trainer(settings),
        ),
        **{name: parts[name] for name in ("windows", "propagation", "walk")},
    )
    return method, Execution(compute=compute, store=store, batch_size=batch_size, seed=seed)


@contextmanager
def _prepared(model: PreTrainedModel) -> Iterator[None]:
    """A context in which a model is on the CPU, in evaluation mode and without gradients; it returns to what it was.

    Raises:
        ValueError: The model is spread over several devices, or quantised.
    """
    if len({parameter.device for parameter in model.parameters()}) > 1 or getattr(model, "hf_device_map", None):
        raise ValueError("the model is spread over several devices; load it without device_map.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model's weights are quantised and cannot be pruned; use the checkpoint it was made from.")
    device = next(model.parameters()).device
    training = {module: module.training for module in model.modules()}
    with_gradient = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.to("cpu").requires_grad_(False).eval()  # type: ignore[arg-type]
    try:
        yield
    finally:
        model.to(device)  # type: ignore[arg-type]
        for module, was in training.items():
            module.training = was
        for parameter in with_gradient:
            parameter.requires_grad_(True)
