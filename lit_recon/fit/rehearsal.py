"""The rehearsal of a run: two training steps of the first window of a tiny model, before anything is read or written.

The tiny model is of the model's own class with few and narrow layers; method, trainer, callbacks and batch size are the
real ones, and so is the way through the code. What would end the first window ends the rehearsal. What fails on the
tiny model is tried again in layers of the real width, since it may depend on that.
"""

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedModel

from lit_recon.data.packing import PADDING
from lit_recon.data.source import Samples
from lit_recon.fit.job import Execution, Method
from lit_recon.fit.session import open_session, reconstruct
from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import decoder_layers
from lit_recon.model.few_layers import few_layers
from lit_recon.pruning.criteria.given import GivenMasks
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.masks import Masks
from lit_recon.reconstruction.driver import WalkCallback
from lit_recon.reconstruction.window_result import WindowResult

LENGTH = 8  # tokens of a sample
MOST = 32  # batches
LARGEST = 50_000_000  # parameters of a real layer, up to which it is tried
NARROW = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 4}
NARROW |= {"head_dim": 16, "vocab_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}


def rehearse(
    model: PreTrainedModel,
    method: Method,
    execution: Execution,
    *,
    num_samples: int,
    num_held_out: int,
    padded: bool = False,
) -> None:
    """Fit two steps of a tiny window as the run will fit each of its windows.

    Nothing that the run draws or keeps changes: random states are put back, and parts that could hold state are copies.

    Args:
        model: The model, or its skeleton on the meta device; not changed.
        method: What is done.
        execution: How.
        num_samples: Calibration samples.
        num_held_out: Held-out samples.
        padded: Whether samples end with padding.

    Raises:
        Exception: Whatever would end the first window.
    """
    counts = (num_samples, num_held_out)
    with _unnoticed():
        try:
            _fit_two_steps(_narrow(model), method, execution, counts, padded=padded)
        except Exception:
            layer = decoder_layers(model)[1][0]
            if sum(parameter.numel() for parameter in layer.parameters()) > LARGEST:
                raise
            _fit_two_steps(few_layers(model, {}), method, execution, counts, padded=padded)


def _fit_two_steps(
    model: PreTrainedModel, method: Method, execution: Execution, counts: Sequence[int], *, padded: bool
) -> None:
    """Walk over the first window of a small model, stopping its Trainer after the second step."""
    windows = method.windows
    windows = replace(windows, match=None, skip=0.0)  # they are of the real model's layers
    windows = replace(windows, size=1, stride=None) if windows.by == "blocks" else windows
    with TemporaryDirectory(prefix="lit_recon.") as scratch:
        stopping = partial(_stopping, scratch=scratch, batches=-(-counts[0] // execution.batch_size))
        pruning, training = method.pruning, method.training
        method = replace(
            method,
            pruning=replace(
                pruning,
                # Given masks are of the real model.
                criterion=Magnitude() if isinstance(pruning.criterion, GivenMasks) else _copy(pruning.criterion),
                pattern=_copy(pruning.pattern),
                refinement=_copy(pruning.refinement),
                rules=None,  # on names of the real model
            ),
            training=replace(
                training,
                module=_copy(training.module),
                fitting=replace(training.fitting, retry_rates=()),
                trainer=stopping(training.trainer),
                retraining_trainer=stopping(training.retraining_trainer or training.trainer),
            ),
            windows=windows,
        )
        execution = replace(execution, stop_after=None)
        most = [min(count, MOST * execution.batch_size) for count in counts]
        samples = _samples(model.config.get_text_config().vocab_size, *most, padded=padded)
        session = open_session(model, samples, method, execution, activations=Path(scratch, "activations"))
        with session.chain.passes.store, contextlib.suppress(_Enough):
            # With a head the last window is trained otherwise, and so are all layers at once.
            callbacks = () if windows.head or method.walk != "local" else [_FirstFit()]
            reconstruct(session, method, execution, Masks(), callbacks=callbacks, logger=DummyLogger())  # type: ignore[arg-type]


class _Enough(Exception):
    """The first window is fitted."""


class _FirstFit(WalkCallback):
    """Ends a walk after its first fit."""

    def on_window_fit(self, result: WindowResult) -> None:
        """End it."""
        raise _Enough


class _SecondStep(Callback):
    """Ends a fit after the second step of its optimizer, or after the batches of two where it has none."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop."""
        trainer.should_stop |= trainer.global_step > 1 or batch_idx + 1 >= 2 * trainer.accumulate_grad_batches


def _stopping(trainer: Callable[..., Trainer], scratch: str, batches: int) -> Callable[..., Trainer]:
    """Makes Trainers that stop after the second step, of so many batches, and write to a scratch folder only."""

    def make(*, callbacks: Sequence[Callback], **settings: Any) -> Trainer:
        least = {"min_epochs": None, "min_steps": None, "default_root_dir": scratch}
        made: Any = trainer(callbacks=[*callbacks, _SecondStep()], **settings | least)
        if isinstance(made.val_check_interval, int) and MOST < made.val_check_interval <= batches:
            made.val_check_interval = MOST  # which Lightning does not accept beyond the number of batches
        return made

    return make


def _samples(vocabulary: int, num_samples: int, num_held_out: int, *, padded: bool) -> Samples:
    calibration_ST, held_out_ST, evaluation_ST = (
        torch.randint(vocabulary, (count, LENGTH)) for count in (num_samples, num_held_out, 1)
    )
    if padded:
        calibration_ST[:, -1] = held_out_ST[:, -1] = PADDING
    return Samples(calibration_ST, held_out_ST, evaluation_ST, "rehearsal")


def _narrow(model: PreTrainedModel) -> PreTrainedModel:
    """A tiny model of a model's class; a tiny Llama where that cannot be made or does not compute."""
    try:
        heads = getattr(model.config.get_text_config(), "num_attention_heads", 4)
        grouped = getattr(model.config.get_text_config(), "num_key_value_heads", heads) != heads
        tiny = few_layers(model, NARROW | {"num_key_value_heads": 2 if grouped else 4})
        tiny(torch.zeros(1, LENGTH, dtype=torch.long))
        return tiny
    except Exception:  # widths of a family may hang together in ways of its own
        return tiny_model("llama")


def _copy(part: Any) -> Any:
    """A copy of a part of the method, whose state the run starts from; itself, where it cannot be copied."""
    try:
        return deepcopy(part)
    except Exception:  # it may hold anything
        return part


@contextmanager
def _unnoticed() -> Iterator[None]:
    """A context that prints nothing, draws nothing and collects no garbage of the process."""
    ours = logging.getLogger("lit_recon")
    level = ours.level
    gc.freeze()  # a walk collects, which takes half a second of all that was imported
    try:
        with isolate_rng(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            ours.setLevel(logging.ERROR)
            yield
    finally:
        ours.setLevel(level)
        gc.unfreeze()
