"""Global retraining: all layers of the pruned model at once, by the same LightningModules as windows.

    1. move all layers to the device, in float32
    2. fit them as one window on token samples: Trainer, acceptance, rates and curves are those of every window
    3. move them back; callbacks commit the result

It follows a walk, which prunes and may reconstruct. Within the fit every so many steps of the optimizer are committed
(fit_state.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_recon.activations.passes import Passes
from lit_recon.activations.teacher import TeacherLayers
from lit_recon.activations.token_samples import TokenSamples
from lit_recon.model.decoder import Decoder
from lit_recon.model.head import Head
from lit_recon.model.matrices import LayerMatrices
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.windows import DecoderWindow
from lit_recon.modules.losses import TARGETS, kl_divergence, targets_of, with_head
from lit_recon.pruning.masks import Masks
from lit_recon.reconstruction.driver import WalkCallback
from lit_recon.reconstruction.window_fit import WindowFitter
from lit_recon.reconstruction.window_result import WindowResult
from lit_recon.system.signals import protected

WALKS = ("local", "global", "local_then_global")
MEASURES = {"tokens": "cross-entropy", "logits": "KL divergence"}  # others: "relative error"


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """How all layers are trained at once.

    Attributes:
        loss: A loss of the whole model (next tokens, logits, hidden states), or any other: of the last hidden states.
        rate: Its learning rate, as a share of the module's.
        max_epochs: Passes over the samples; None: as many as of each window.
        commit_every: Steps of the optimizer from commit to commit.
        checkpoint_layers: Whether backward computes each layer again rather than keep what it needs of all layers.
    """

    loss: Callable[..., Tensor] = kl_divergence
    rate: float = 0.1
    max_epochs: int | None = None
    commit_every: int = 50
    checkpoint_layers: bool = True

    def __post_init__(self) -> None:
        """Check the settings; all problems in one message."""
        problems = []
        if not 0 < self.rate <= 1:
            problems.append(f"retraining.rate={self.rate}: expected a share of the module's learning rate, up to 1.")
        for name, value in (("commit_every", self.commit_every), ("max_epochs", self.max_epochs)):
            if value is not None and value < 1:
                problems.append(f"retraining.{name}={value}: expected a whole number, 1 or more.")
        if problems:
            raise ValueError("\n".join(problems))

    def describe(self) -> dict[str, str]:
        """In the words of the settings, for a run's recipe."""
        loss: Any = self.loss
        while isinstance(loss, partial):
            loss = loss.func
        epochs = {} if self.max_epochs is None else {"retraining_epochs": str(self.max_epochs)}
        return {"retraining_loss": loss.__name__, "retraining_rate": f"{self.rate:g}"} | epochs


def needs_head(loss: Callable[..., Any]) -> bool:
    """Whether a loss is on the logits."""
    return targets_of(loss) in ("logits", "tokens")


def is_of_model(loss: Callable[..., Any]) -> bool:
    """Whether a loss has a meaning for all layers at once only."""
    return targets_of(loss) in TARGETS.values()


@dataclass(frozen=True)
class Retrained:
    """All layers, and what they are trained on.

    Attributes:
        window: The layers.
        data: Token samples.
    """

    window: DecoderWindow
    data: TokenSamples


def open_retraining(
    settings: Retraining,
    passes: Passes,
    matrices: LayerMatrices,
    weights: WeightOffloader,
    *,
    samples_ST: Tensor | None = None,
) -> Retrained:
    """All layers of a model that is dense, and what they will be trained on.

    Args:
        settings: How they will be trained.
        passes: Knows the samples.
        matrices: The matrices by layer.
        weights: Moves the weights; says what the dense ones are.
        samples_ST: Tokens of the samples that they are trained on; None: the calibration samples.
    """
    layers = list(passes.decoder.layers)
    found = [matrix for layer in matrices for matrix in layer]
    window = DecoderWindow(layers, matrices=found, checkpoint_layers=settings.checkpoint_layers)
    targets = targets_of(settings.loss)
    if needs_head(settings.loss):
        window.head = Head(Decoder(passes.decoder.model, torch.device("cpu")))
    losses = with_head(settings.loss, window.head) if is_of_model(settings.loss) else None
    window.measure = MEASURES.get(targets, window.measure)
    needed = targets != "tokens"
    teacher = TeacherLayers(layers if needed else [], weights.dense_layer, passes.compute)
    data = TokenSamples(
        passes,
        window,
        teacher,
        targets=targets,
        losses=losses,
        max_epochs=settings.max_epochs,
        retraining_ST=samples_ST,
    )
    return Retrained(window, data)


def retrain(
    retrained: Retrained,
    masks: Masks,
    *,
    fitter: WindowFitter,
    weights: WeightOffloader,
    callbacks: Sequence[WalkCallback] = (),
    done: Sequence[WindowResult] = (),
) -> list[WindowResult]:
    """Train all layers at once.

    Args:
        retrained: The layers, pruned now.
        masks: Masks of their matrices.
        fitter: Fits them.
        weights: Moves their weights.
        callbacks: Of the walk: the fit is the last of its windows.
        done: Results of the walk.

    Returns:
        Those, and the fit's.
    """
    window = retrained.window
    weights.onload(window)
    kept = {name: masks[name].to(fitter.device) for name in masks}
    results = [*done, fitter.fit(window, kept, retrained.data, weights.dtypes(window))]
    for callback in callbacks:
        callback.on_window_fit(results[-1])
    with protected():
        weights.offload(window)
        for callback in callbacks:
            callback.on_window_end(window, {}, results)
    return results
