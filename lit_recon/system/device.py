"""Where and how precisely a run computes: the device and the precision that every pass of a run shares."""

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_recon.system.quiet_libraries import quietly

_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PRECISIONS = tuple(_AUTOCAST)  # by Lightning's names


def bf16_is_fast(device: torch.device) -> bool:
    """Whether matrix products in bf16 run on instructions made for them, rather than emulated ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # AVX512 alone is not enough: without the BF16 extension, mkldnn converts to float32 and back.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def cpu_name() -> str:
    """Name of the CPU, as the system tells it."""
    with suppress(OSError):  # not Linux, or no /proc
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def waiting_for(device: torch.device) -> Callable[[], None] | None:
    """What waits for all that a device computes; None where nothing is computed in the background."""
    if device.type != "cuda":
        return None

    def wait() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize(device)

    return wait


@dataclass(frozen=True)
class Compute:
    """Device of a run, and its precision by Lightning's name; master weights are float32 in every precision.

    Attributes:
        device: The device.
        precision: The precision.
        measured: Where that was chosen by measurement, seconds of a step of a layer by precision.
    """

    device: torch.device
    precision: str
    measured: Mapping[str, float] = field(default_factory=dict, compare=False)

    @classmethod
    def choose(cls, trainer: "partial[Trainer]", precision: str) -> "Compute":
        """Choose the device as Lightning does for `trainer`, and the precision; "auto" depends on the hardware.

        Raises:
            ValueError: A precision other than "auto", "32-true", "bf16-mixed" or "16-mixed"; a device without float64,
                in which errors are summed; more than one device; float16 without a GPU.
        """
        if precision not in ("auto", *_AUTOCAST):
            raise ValueError(
                f"trainer.precision={precision!r}: expected one of auto, {', '.join(_AUTOCAST)} "
                "(weights kept in 16 bits do not learn at the rates of reconstruction)."
            )
        trainer = one_process(trainer)
        strategy = trainer(precision="32-true", logger=False).strategy
        if strategy.root_device.type == "mps":
            if trainer.keywords.get("accelerator", "auto") != "auto":
                raise ValueError("Apple's GPU has no float64, in which errors are summed; use trainer.accelerator=cpu.")
            strategy = trainer(precision="32-true", logger=False, accelerator="cpu").strategy
        device = strategy.root_device
        if type(strategy) is not SingleDeviceStrategy:
            given = trainer.keywords.get("devices", "auto")
            raise ValueError(
                f"trainer.devices={given} leads to {type(strategy).__name__}: a run uses one device; use "
                "trainer.devices=1 (or [n]) without trainer.strategy and trainer.num_nodes."
            )
        if precision == "16-mixed" and device.type == "cpu":
            raise ValueError("trainer.precision=16-mixed: float16 needs a GPU; use bf16-mixed or 32-true.")
        if precision == "auto":
            precision = "bf16-mixed" if bf16_is_fast(device) else "32-true"
        return cls(device, precision)

    @classmethod
    def default(cls) -> "Compute":
        """The device that Lightning picks, in the precision that its hardware is fast in."""
        with quietly():
            return cls.choose(partial(Trainer, accelerator="auto", devices=1), "auto")

    def trainers(self, trainer: "partial[Trainer]") -> Callable[..., Trainer]:
        """Factory of Trainers for this device and precision, each with fresh copies of the callbacks of `trainer`.

        A callback may hold state, such as a counter, which must not pass from one window to the next. Where `trainer`
        has no strategy of its own, what a fit leaves stays on the device.

        Raises:
            ValueError: A callback that cannot be copied.
        """
        own = _callbacks(trainer)
        try:
            deepcopy(own)
        except Exception as error:  # the user's own objects may raise anything
            raise ValueError(f"trainer.callbacks: each window gets a copy of them, but {error}.") from error

        trainer = one_process(trainer)
        has_strategy = trainer.keywords.get("strategy", "auto") != "auto"

        def make(*, callbacks: Sequence[Callback], **settings: Any) -> Trainer:
            where = {"precision": self.precision, "accelerator": self.device.type, "enable_checkpointing": False}
            where |= {} if has_strategy else {"strategy": ResidentStrategy(self.device)}
            return trainer(callbacks=[*deepcopy(own), *callbacks], **where | settings)

        return make

    def autocast(self) -> AbstractContextManager:
        """Context for passes outside of training steps, with the same autocast as in Lightning's training steps."""
        dtype = _AUTOCAST[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype, cache_enabled=False)


class ResidentStrategy(SingleDeviceStrategy):
    """One device, on which everything stays when a fit ends: the next window's needs it there.

    Lightning's own moves weights, masks and the optimizer's states to the CPU, 24 bytes per parameter of a window, and
    has a GPU's allocator return its memory, which the next window asks for again.
    """

    def teardown(self) -> None:
        """End precision and checkpoints, and move nothing."""
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()


class _NoCheckpoints(CheckpointIO):
    """Refuses Lightning's checkpoints, which are pickles: a run has its own resume points."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raise a ValueError: a callback wants to write one."""
        raise ValueError(f"a callback of the Trainer writes {path}, a pickle; a run writes none: leave it out.")

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Raise a ValueError: there are none."""
        raise ValueError(f"a callback of the Trainer reads {path}, a pickle; a run reads none: leave it out.")

    def remove_checkpoint(self, path: Any) -> None:
        """Nothing: there are none."""


def trainer_problem(make: "partial[Any]") -> str | None:
    """What is wrong with the class that a Trainer is to be of; None: nothing."""
    if isinstance(make.func, type) and issubclass(make.func, Trainer):
        return None
    return f"trainer._target_={make.func}: expected lightning.Trainer, or a class that inherits from it."


def without_strategy(trainer: "partial[Trainer]") -> "partial[Trainer]":
    """A Trainer without its strategy, which is for the fit of all layers at once: a window needs none."""
    settings = {name: value for name, value in trainer.keywords.items() if name != "strategy"}
    return partial(trainer.func, *trainer.args, **settings)


def _callbacks(trainer: "partial[Trainer]") -> list[Any]:
    """The callbacks that a Trainer is given."""
    given = trainer.keywords.get("callbacks") or []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def one_process(trainer: "partial[Trainer]") -> "partial[Trainer]":
    """A Trainer that is one process, whatever the environment says of others, and that writes no pickles.

    Lightning takes RANK, LOCAL_RANK, SLURM_NTASKS, ... of a job for those of a run that is spread over its processes.

    Raises:
        ValueError: `enable_checkpointing`, a callback that writes checkpoints, or arguments of the Trainer in the
            environment.
    """
    if writers := [type(callback).__name__ for callback in _callbacks(trainer) if isinstance(callback, Checkpoint)]:
        raise ValueError(
            f"of its callbacks, {', '.join(writers)} writes checkpoints of Lightning, which are pickles; a run has its "
            "own resume points and writes none; leave it out."
        )
    if trainer.keywords.get("enable_checkpointing") not in (None, False):
        raise ValueError(
            f"trainer.enable_checkpointing={trainer.keywords['enable_checkpointing']}: a run has its own resume points "
            "and writes no pickles; leave it out."
        )
    if asked := sorted(name for name in os.environ if name.startswith("PL_TRAINER_") and os.environ[name]):
        settings = " ".join(f"+trainer.{name.removeprefix('PL_TRAINER_').lower()}={os.environ[name]}" for name in asked)
        raise ValueError(
            f"the environment has {', '.join(asked)}, which Lightning's Trainer obeys and config.yaml would not know; "
            f"unset that and give {settings}."
        )
    given = trainer.keywords.get("plugins") or []
    plugins = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    return partial(trainer, plugins=[*plugins, LightningEnvironment(), _NoCheckpoints()])
