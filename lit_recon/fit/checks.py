"""Rules between settings, and between settings and a model: asked before weights are loaded, and again with weights.

Each raises a ValueError, or adds a problem, that says what was given, what is allowed and what to do.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from lit_recon.activations.matrix_inputs import check_experts
from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import StoreSettings, check_targets
from lit_recon.activations.teacher import check_halves
from lit_recon.data.source import Samples
from lit_recon.fit.allocate import by_rules
from lit_recon.fit.job import PRUNE_BY, Method, callable_name
from lit_recon.fit.pruning_checks import check_pattern, check_scored
from lit_recon.model.matrices import LayerMatrices, find_matrices
from lit_recon.model.partition import Partition, layer_windows
from lit_recon.model.windows import (
    AnyWindow,
    MatrixWindow,
    Window,
    WindowKind,
    enclosing_windows,
    named_parameters,
)
from lit_recon.modules.mask_lora import MaskLora
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.modules.norms_biases import NormsBiases
from lit_recon.modules.rates import make_optimizer
from lit_recon.modules.trained import needs_gram, trained_by
from lit_recon.modules.untrained import Untrained
from lit_recon.pruning.criteria import changes_weights
from lit_recon.pruning.criteria.given import GivenMasks
from lit_recon.pruning.pruner import check_nested
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.reconstruction.retraining import WALKS, Retraining, is_of_model
from lit_recon.system.command_line import Problems

log = logging.getLogger(__name__)


def check_settings(
    problems: Problems,
    *,
    windows: Partition | None,
    module: Callable[..., Any] | None,
    propagation: Propagation | None,
    store: StoreSettings | None,
    prune_by: str,
    fitting: FitSettings | None,
    trainer: dict[str, Any],
    walk: str = "local",
    retraining: Retraining | None = None,
) -> None:
    """Add what is wrong with settings, alone and together; None for a part that could not be made."""
    _check_walk(problems, walk, windows, module, retraining)
    if isinstance(windows, Partition):
        if module and needs_gram(module) and windows.by != WindowKind.MATRIX:
            problems.add(
                f"{callable_name(module)} (module=least_squares) solves for single matrices; use "
                f"windows=matrix, not {windows.by}."
            )
        by_matrix = windows.by == WindowKind.MATRIX
        if by_matrix and getattr(module, "keywords", {}).get("token_weights"):
            problems.add(
                "module.token_weights with windows=matrix: single matrices are trained on rows of their inputs, which "
                "are no tokens of samples; use windows=half or block."
            )
        if by_matrix and _is(module, NormsBiases):
            problems.add(
                f"{callable_name(module)} (module=norms_biases) with windows=matrix: a single matrix has neither norms "
                "nor biases; use windows=half, block, blocks or model."
            )
        if propagation and prunes_apart(prune_by, propagation) and by_matrix and prune_by == WindowKind.HALF:
            problems.add(
                "prune_by=half with windows=matrix and chain.statistics=sparse: single matrices are pruned in layers "
                "that stay dense; use window, block or model."
            )
        if store:
            problems.check(check_targets, windows.by, store.targets)
    if prune_by not in PRUNE_BY:
        problems.add(f"prune_by={prune_by}: expected one of {', '.join(PRUNE_BY)}.")
    if fitting and fitting.start != "none" and module and needs_gram(module):
        problems.add(
            f"start={fitting.start} with {callable_name(module)} (module=least_squares): both solve for each matrix; "
            "leave start out, or use another module."
        )
    if isinstance(module, partial):
        clipped = trainer.get("gradient_clip_val") if trainer["precision"] == "16-mixed" else None
        check_optimizer(module, problems, clipped=clipped)
    if trainer.get("logger") is not None:
        problems.add("trainer.logger: a run has one log for all windows, TensorBoard's; leave it out.")
    problems.check(check_steps, trainer["max_epochs"], trainer["max_steps"], trainer["accumulate_grad_batches"])


def _is(module: Callable[..., Any] | None, kind: type) -> bool:
    """Whether a module, or the class of a partial call, is of a kind."""
    made = getattr(module, "func", module)
    return inspect.isclass(made) and issubclass(made, kind)


def _check_walk(
    problems: Problems,
    walk: str,
    windows: Partition | None,
    module: Callable[..., Any] | None,
    retraining: Retraining | None,
) -> None:
    """Add what does not fit a walk, and what has a meaning in another one only."""
    if walk not in WALKS:
        problems.add(f"walk={walk}: expected one of {', '.join(WALKS)}.")
        return
    own = getattr(module, "keywords", {}).get("loss")
    if walk != "global" and own and is_of_model(own):
        problems.add(
            f"loss={callable_name(own)} with walk={walk}: it is of the whole model, which walk=global trains at once; "
            + ("for that after the windows give loss@retraining.loss=..." if walk != "local" else "give walk=global, ")
            + ("" if walk != "local" else "or windows.head=true for the divergence of the last window's logits.")
        )
    if walk == "local":
        return
    if module and needs_gram(module):
        problems.add(
            f"walk={walk} with {callable_name(module)} (module=least_squares), which solves for single matrices: use "
            "module=masked_weights, or walk=local."
        )
    elif module and getattr(module, "func", module) is Untrained:
        problems.add(f"walk={walk} with module=none, which trains nothing: leave walk out, or choose another module.")
    elif module and retraining and not _takes(module, "loss"):
        problems.add(f"walk={walk}: {callable_name(module)} takes no loss, by which all layers are trained at once.")
    if walk == "global" and isinstance(windows, Partition):
        meant = {
            "windows=matrix": windows.by == WindowKind.MATRIX,
            "windows.head=true": windows.head,
            f"windows.match={windows.match}": windows.match is not None,
            f"windows.skip={windows.skip:g}": windows.skip > 0,
        }
        for given in (name for name, is_given in meant.items() if is_given):
            problems.add(
                f"walk=global with {given}: windows are pruned only, and that of how they would be reconstructed has "
                "no meaning; leave it out, or use walk=local_then_global."
            )


def _takes(make: Callable[..., Any], name: str) -> bool:
    """Whether a class or function, or a partial call of it, has an argument of a name."""
    while isinstance(make, partial):
        make = make.func
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):  # a builtin that does not say what it takes
        return False
    return name in parameters or any(one.kind == inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def prunes_apart(prune_by: str, propagation: Propagation) -> bool:
    """Whether it makes a difference that something else than each window is pruned at once."""
    return prune_by != "window" and propagation.statistics == "sparse"


def check_model(model: PreTrainedModel, method: Method, matrices: LayerMatrices | None = None) -> None:
    """Check that a method fits a model; asked of its shapes alone, and again with weights.

    Args:
        model: The model, or its skeleton on the meta device.
        method: What is to be done.
        matrices: Its matrices by layer, as a pass has shown them; None: as their modules' kinds tell.

    Raises:
        ValueError: What does not fit.
    """
    method.windows.check(model)
    matrices = find_matrices(model) if matrices is None else matrices
    found = [matrix for layer in matrices for matrix in layer]
    patterns = by_rules(method, found)
    check_pattern(found, {one.name: patterns.get(one.name, [method.pruning.pattern]) for one in found})
    if isinstance(method.pruning.criterion, GivenMasks):
        method.pruning.criterion.check(found)
    if method.windows.by == WindowKind.MATRIX:
        check_experts([matrix for matrix in found if matrix.input_dim is not None], method.propagation)


def check_samples(model: PreTrainedModel, samples: Samples) -> None:
    """Check that samples are for a model, or its skeleton; warn of samples beyond the context it was trained with.

    Raises:
        ValueError: A token has no row in the model's embedding.
    """
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    rows = len(embedding)
    parts = {"calibration": samples.calibration_ST, "held-out": samples.held_out_ST}
    parts |= {} if samples.retraining_ST is None else {"retraining": samples.retraining_ST}
    for part, tokens_ST in (parts | {"evaluation": samples.evaluation_ST}).items():
        if (largest := int(tokens_ST.max())) >= rows:
            raise ValueError(
                f"the {part} text has the token {largest}, and the model's embedding {rows} rows, 0 to {rows - 1}: the "
                "tokenizer is of another model, or tokens were added to it; use the model's own tokenizer, or give the "
                "model rows for them (resize_token_embeddings)."
            )
    length = samples.calibration_ST.shape[1]
    if samples.retraining_ST is not None and (own := samples.retraining_ST.shape[1]) != length:
        raise ValueError(
            f"retraining_ST has samples of {own} tokens, and calibration_ST of {length}: give all of one length."
        )
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for setting, tokens_ST in (("length", samples.calibration_ST), ("evaluation_length", samples.evaluation_ST)):
        if isinstance(trained, int) and (length := tokens_ST.shape[1]) > trained:
            log.warning(
                "data.%s=%d: longer than the context that %s was trained with, %d tokens (max_position_embeddings), so "
                "that even the dense model may be poor there",
                *(setting, length, type(model).__name__, trained),
            )


def check_retraining_samples(number: int, walk: str) -> None:
    """Check that something is trained on samples of their own for all layers at once.

    Raises:
        ValueError: There are some, and only windows are trained.
    """
    if number and walk == "local":
        raise ValueError(
            f"data.num_retraining={number} with walk=local: those samples are for all layers at once; give "
            "walk=local_then_global or walk=global, or leave data.num_retraining out."
        )


def check_windows(
    windows: Sequence[AnyWindow], pruning_windows: Sequence[Window], method: Method, *, recompute: bool
) -> None:
    """Check that a method fits the windows of a loaded model.

    Raises:
        ValueError: Pruning windows overlap with windows in part, targets cannot be recomputed, a matrix cannot be
            scored, or windows that are to be solved for are not dense when they are pruned.
    """
    check_nested(pruning_windows, windows)
    if method.training.fitting.start != "none" and _are_smaller(pruning_windows, windows):
        raise ValueError(
            f"start={method.training.fitting.start} with prune_by={method.pruning.prune_by} and "
            f"windows={method.windows.by}: a window is solved for while it is dense, and this prunes parts of it one "
            "after the other; use prune_by=window."
        )
    check_larger(method, windows, pruning_windows)
    check_halves(windows, method.propagation, recompute=recompute)
    check_scored(
        [matrix for layer in enclosing_windows(windows) for matrix in layer.matrices()],
        allow_unscored=method.pruning.allow_unscored,
    )


def check_larger(method: Method, windows: Sequence[AnyWindow], pruning_windows: Sequence[Window]) -> None:
    """Raise a ValueError for a criterion that changes weights where more than a window is pruned at once."""
    if changes_weights(method.pruning.criterion) and _are_smaller(windows, pruning_windows):
        raise ValueError(
            f"criterion={type(method.pruning.criterion).__name__} with prune_by={method.pruning.prune_by}, "
            f"windows={method.windows.by} and chain.statistics=sparse: the weights that it changes would be kept for "
            "several windows; use prune_by=window, another criterion, or chain.statistics=dense."
        )


def _are_smaller(windows: Sequence[AnyWindow], others: Sequence[AnyWindow]) -> bool:
    """Whether some window is a part of one of the others, single matrices as whole layers."""
    found, larger = (
        [{matrix.name for matrix in one.enclosing.matrices()} for one in some] for some in (windows, others)
    )
    return any(one < other for one in found for other in larger)


def check_steps(max_epochs: Any, max_steps: Any, accumulate: Any) -> None:
    """Raise a ValueError where a window would be trained not at all or for ever."""
    if not all(isinstance(number, int) for number in (max_epochs, max_steps, accumulate)):
        raise ValueError("trainer.max_epochs, max_steps and accumulate_grad_batches are whole numbers.")
    if max_epochs == 0 or max_steps == 0 or (max_epochs < 0 and max_steps < 0) or accumulate < 1:
        raise ValueError(
            f"trainer.max_epochs={max_epochs} max_steps={max_steps} accumulate_grad_batches={accumulate}: expected "
            "max_epochs or max_steps of at least 1 (-1 leaves one of them open), accumulating 1 batch or more."
        )


def check_module(module: Callable[..., Any], model: PreTrainedModel, *, single: bool) -> None:
    """Raise a ValueError where no LightningModule can be made of its settings.

    Args:
        module: Makes it from (window, masks, unit).
        model: The model, which needs no weights.
        single: Whether windows are single matrices.
    """
    if single and (train := getattr(module, "keywords", {}).get("train")) is not None:
        raise ValueError(
            f"module.train={train} with windows=matrix: each matrix is a window of its own; choose them by "
            f"windows.match={train}."
        )
    layers = list({repr(layer): layer for layer in reversed(layer_windows(model))}.values())  # the first of each kind
    windows = [MatrixWindow(layer.matrices()[0], layer) if single else layer for layer in layers]
    window, masks = windows[0], _ones(windows[0])
    function = getattr(module, "func", module)  # of a class, its constructor's signature, which names what is wrong
    try:
        inspect.signature(function).bind(window, masks, 1.0, **getattr(module, "keywords", {}))
    except (TypeError, ValueError) as error:  # arguments that do not fit; a builtin that does not say what it takes
        raise ValueError(f"module: {error}") from error
    maker = function.__init__ if inspect.isclass(function) else function
    if (getattr(maker, "__module__", None) or "").startswith("lit_recon."):  # others may look at the window
        made = [module(one, _ones(one), 1.0) for one in windows]
        for one in made:
            if isinstance(one, MaskLora):
                one.check_rank()
        if not _is(module, Untrained) and not any(map(trained_by, made, windows)):
            raise ValueError(
                f"{callable_name(module)}: the layers of {type(model).__name__} have nothing that it trains"
                + _why_nothing(module, windows)
            )


def _why_nothing(module: Callable[..., Any], windows: Sequence[AnyWindow]) -> str:
    """What to do where a module trains nothing of some windows."""
    if train := getattr(module, "keywords", {}).get("train"):
        names = ", ".join(dict.fromkeys(name for window in windows for name, _ in named_parameters(window)))
        return f": module.train={train} is in none of the names {names}, or only in those that it leaves as they are."
    return "; use module.train_norms=true, or another module (module=none trains nothing)."


def _ones(window: AnyWindow) -> dict[str, torch.Tensor]:
    """Masks of a window that keep all."""
    return {matrix.name: torch.ones_like(matrix.weight, dtype=torch.bool) for matrix in window.matrices()}


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
    optimizer = problems.check(make_optimizer, module.keywords["optimizer"], parameters, about="module.optimizer: ")
    schedule = module.keywords.get("scheduler")
    ours = getattr(module.func, "configure_optimizers", None) is MaskedWeights.configure_optimizers
    if optimizer and schedule and ours:  # another may call it otherwise
        try:
            schedule(optimizer=optimizer, num_warmup_steps=10, num_training_steps=100)
        except (ValueError, TypeError) as error:
            problems.add(f"module.scheduler: {error}")
        except Exception:  # of a function that is made for other numbers of steps; the rehearsal has a real one
            log.debug("module.scheduler cannot be tried with 100 steps", exc_info=True)
    if clipped and getattr(optimizer, "_step_supports_amp_scaling", False):
        problems.add(
            f"trainer.gradient_clip_val={clipped} with trainer.precision=16-mixed: a fused optimizer scales gradients "
            "back only as it steps; give module.optimizer.fused=false."
        )
