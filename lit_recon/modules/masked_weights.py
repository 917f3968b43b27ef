"""Masked weights: train by gradient descent what pruning left of a window until it outputs what the dense one did.

    min over theta of  || window(x; theta * mask) - window(x; theta_dense) ||^2 / unit    (arXiv 2510.14444)

Pruned weights are zero before training and their gradients are zeroed before each step. An elementwise optimizer such
as AdamW then never moves them (nor does its weight decay), which costs less than masking the weights in every forward.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_recon.activations.datamodule import Batch
from lit_recon.model.vectors import vectors
from lit_recon.model.windows import AnyWindow, named_parameters
from lit_recon.modules.curves import Curves
from lit_recon.modules.losses import huber, with_head
from lit_recon.modules.optimizers import ELEMENTWISE
from lit_recon.modules.rates import PROBE, make_optimizer
from lit_recon.modules.schedules import linear_with_warmup
from lit_recon.system.expressions import check_expression

# conf/optimizer/adamw.yaml, conf/loss/huber.yaml
ADAMW = partial(AdamW, lr=PROBE, eps=1e-15, weight_decay=0.0, fused=True)  # type: ignore[arg-type]
HUBER = partial(huber, delta=1.0)


class MaskedWeights(LightningModule):
    """One window with masked parameters and a loss against dense activations.

    For another objective or training rule subclass it, or write a LightningModule with the same first three arguments.
    What it logs appears in TensorBoard under the window's name, at the global step.

    Args:
        window: The pruned window; its parameters are float32.
        masks: Boolean mask per pruned matrix (True = kept), by the names that `window.matrices()` gives.
        unit: Unit of the loss: the median over tokens of the energy of the window's dense update.
        optimizer: Makes the optimizer from groups of parameters; a partial call with lr="probe" leaves its rate to be
            found by trying (rates.py).
        scheduler: Makes the scheduler from `optimizer`, `num_warmup_steps` and `num_training_steps`, the signature of
            transformers.get_cosine_schedule_with_warmup and its kin; None: constant rate.
        warmup: Share of the steps in which the learning rate rises.
        train_norms: Whether norms are trained too.
        train_biases: Whether biases are trained too.
        train: Regular expression: only parameters in whose name in their layer it is found are trained, of matrices,
            norms and biases, for example "k_proj|up_proj". None: all of these.
        loss: Function of (outputs, targets, energies_N=..., unit=...) to one number per token (losses.py); where
            the window has a head, one that takes it, else the divergence of the logits.
        token_weights: Function of a batch to weights (B, T), by which the losses of tokens are multiplied before their
            mean is taken; None: 1 for all.
        anchor: Strength a of the pull towards the weights that the fit starts from: a sum (w - w0)^2 / sum w0^2 over
            all that is trained is added to the loss. Above 0 it costs two copies: w0, and w - w0 until the backward.

    Raises:
        ValueError: `warmup` is no share, `anchor` negative, or `train` no regular expression.
    """

    def __init__(
        self,
        window: AnyWindow,
        masks: Mapping[str, Tensor],
        unit: float,
        *,
        optimizer: Callable[..., Optimizer] = ADAMW,
        scheduler: Callable[..., LRScheduler] | None = linear_with_warmup,
        warmup: float = 0.1,
        loss: Callable[..., Tensor] = HUBER,
        token_weights: Callable[[Batch], Tensor] | None = None,
        anchor: float = 0.0,
        train_norms: bool = True,
        train_biases: bool = True,
        train: str | None = None,
    ) -> None:
        super().__init__()
        if type(warmup) not in (int, float) or not 0 <= warmup <= 1:
            raise ValueError(f"module.warmup={warmup}: expected a share of the steps, 0 to 1.")
        if type(anchor) not in (int, float) or not 0 <= anchor < math.inf:
            raise ValueError(f"module.anchor={anchor}: expected a number, 0 (no pull) or more.")
        self.window = window
        self.unit = unit
        self.loss = with_head(loss, window.head)
        self._make_optimizer, self._make_scheduler, self._warmup = optimizer, scheduler, warmup
        self._token_weights, self._anchor = token_weights, anchor
        self._start: list[Tensor] = []  # of what is trained, where that is pulled there
        self._curves = Curves()
        self._chosen = _chosen(window, train)
        norms, biases = vectors(window)
        allowed = [*(norms if train_norms else ()), *(biases if train_biases else ())]
        self.vectors = [one for one in allowed if self.is_chosen(one)]  # that are trained
        frozen = {id(one) for one in (*norms, *biases)} - {id(one) for one in self.vectors}
        self._trained = [one for one in window.own_parameters() if id(one) not in frozen and self.is_chosen(one)]
        self._pruned = [matrix for matrix in window.matrices() if matrix.name in masks]
        for index, matrix in enumerate(self._pruned):  # buffers, so that they move to the device with the window
            mask = zeroing_mask(masks[matrix.name], matrix.weight.dtype, matrix.weight.device.type)
            self.register_buffer(f"mask_{index}", mask, persistent=False)

    def trained(self) -> list[nn.Parameter]:
        """What is trained: the window's own parameters, without norms or biases where these are to stay."""
        return self._trained

    def changed(self) -> list[nn.Parameter]:
        """What is changed of the window: what is trained."""
        return self.trained()

    def is_chosen(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter of the window is one that `train` chooses."""
        return self._chosen is None or id(parameter) in self._chosen

    def sizes(self) -> dict[Tensor, float]:
        """What counts as the root mean square of some of what is trained, where rates are relative to it; of none."""
        return {}

    def forward(self, batch: Batch) -> Tensor:
        """The window's outputs, (B, T, D)."""
        return self.window(batch.inputs_BTD, batch.calls)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch, a mean over its tokens; for the optimizer their sum over a constant (Batch.weight)."""
        loss = self.losses(batch).mean()
        self._note("loss/train", loss, batch)
        if self._anchor:
            pull = self._anchor * self._distance()
            self._note("loss/anchor", pull, batch)
            loss = loss + pull
        return loss * batch.weight

    def _note(self, name: str, value: Tensor, batch: Batch) -> None:
        """Let callbacks see a number of this step, and the curves have it when the step is done."""
        self.log(name, value.detach(), batch_size=batch.num_tokens, logger=False)
        self._curves.note({name: value.detach()})

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the curves."""
        self._curves.log(self.trainer)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss of one held-out batch."""
        self.log("loss/held_out", self.losses(batch).mean(), batch_size=batch.num_tokens)

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each token of a batch, (N), times its weight.

        Raises:
            ValueError: The loss function does not return one number per token.
        """
        outputs_ND, targets_ND = batch.text(self(batch)), batch.text(batch.targets_BTD)
        energies_N = batch.text(batch.energies_BT)
        losses_N = self.loss(outputs_ND, targets_ND, energies_N=energies_N, unit=self.unit)
        if losses_N.shape != energies_N.shape:
            raise ValueError(
                f"loss: expected one number for each of {len(energies_N)} tokens, the mean over its features, and got "
                f"the shape {tuple(losses_N.shape)}"
            )
        return losses_N if self._token_weights is None else losses_N * batch.text(self._token_weights(batch))

    def _distance(self) -> Tensor:
        """Squared distance of what is trained to where it started, over the squared norm of that."""
        pairs = list(zip(self.trained(), self._start, strict=True))
        moved = torch.stack([(parameter - start).square().sum() for parameter, start in pairs]).sum()
        return moved / torch.stack([start.square().sum() for _, start in pairs]).sum()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Zero the gradients of pruned weights."""
        for index, matrix in enumerate(self._pruned):
            if matrix.weight.grad is not None:
                zero_removed(matrix.weight.grad, self.get_buffer(f"mask_{index}"))

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """A step; of an optimizer that moves pruned weights, with zeros put back."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if type(getattr(optimizer, "optimizer", optimizer)) not in ELEMENTWISE:
            with torch.no_grad():
                for index, matrix in enumerate(self._pruned):
                    zero_removed(matrix.weight, self.get_buffer(f"mask_{index}"))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer asks; also under bf16-mixed, where Lightning refuses fused optimizers needlessly."""
        plugin = self.trainer.precision_plugin
        if plugin.precision == "bf16-mixed":  # it has no scaler that a fused optimizer would undo in its step
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_start(self) -> None:
        """Keep the layers as they are in inference, without dropout; remember where an anchor pulls to."""
        self.window.eval()
        if self._anchor:
            self._start = [parameter.detach().clone() for parameter in self.trained()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all parameters of the window, and its schedule over the steps of this fit."""
        trained = [parameter for parameter in self.trained() if parameter.requires_grad]
        optimizer = make_optimizer(self._make_optimizer, trained, self.sizes())
        if self._make_scheduler is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = self._make_scheduler(
            optimizer=optimizer, num_warmup_steps=round(self._warmup * steps), num_training_steps=steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _chosen(window: AnyWindow, train: str | None) -> set[int] | None:
    """Identities of the parameters in whose names an expression is found; None: all."""
    if train is None:
        return None
    check_expression("module.train", train, "names of parameters in their layer, such as self_attn.k_proj.weight")
    return {id(parameter) for name, parameter in named_parameters(window) if re.search(train, name)}


def zeroing_mask(mask: Tensor, dtype: torch.dtype, device_type: str) -> Tensor:
    """A mask (True = kept) in the form in which it zeroes tensors of a dtype fastest, for `zero_removed`.

    A GPU fills where a boolean says what is removed, which reads a byte per weight. A CPU multiplies by numbers of the
    same dtype: by booleans it takes four times as long.
    """
    return ~mask if device_type == "cuda" else mask.to(dtype)


def zero_removed(tensor: Tensor, mask: Tensor) -> None:
    """Zero in place what a mask of `zeroing_mask` removes."""
    if mask.dtype == torch.bool:
        tensor.masked_fill_(mask, 0)
    else:
        tensor.mul_(mask)
