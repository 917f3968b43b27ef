"""The walk against a plain PyTorch loop that makes the passes it needs, on the first windows of SmolLM2, in one run.

pytest -m slow tests/benchmarks -s
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import StoreSettings
from lit_recon.data.source import Samples
from lit_recon.evaluate.perplexity import perplexity
from lit_recon.fit.job import Execution, Method, PruningMethod, Schedule, TrainingMethod
from lit_recon.fit.session import Session, open_session, reconstruct
from lit_recon.model.decoder import Decoder, LayerCall, call_layer
from lit_recon.model.partition import Partition
from lit_recon.model.wheels import WheelModel
from lit_recon.model.windows import Window
from lit_recon.modules.losses import mean_squared
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.modules.schedules import linear_with_warmup
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.masks import Masks
from lit_recon.pruning.patterns import Unstructured
from lit_recon.reconstruction.driver import WalkCallback
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.reconstruction.tensorboard import RunLogger
from lit_recon.reconstruction.window_result import WindowResult
from lit_recon.settings.conf import CONF
from lit_recon.system.device import Compute
from lit_recon.system.quiet_libraries import quiet

WINDOWS, SAMPLES, HELD_OUT, LENGTH, BATCH, RATE = 6, 32, 4, 256, 2, 2e-3
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
EVALUATED, SHARE = 16, 4  # sequences of 512 tokens, of which one in four is measured
ByMatrix = dict[nn.Linear, Tensor]


Autocast = Callable[[], AbstractContextManager]


def rows(first: int, last: int) -> list[slice]:
    """Batches of the samples from `first` up to `last`."""
    return [slice(start, start + BATCH) for start in range(first, last, BATCH)]


def plain_targets(layer: nn.Module, call: LayerCall, dense_STD: Tensor, autocast: Autocast) -> tuple[Tensor, ByMatrix]:
    """What the dense layer outputs for all samples, and Wanda's statistics of the calibration samples."""
    norms = {linear: torch.zeros(linear.in_features) for linear in linears(layer)}

    def add(linear: nn.Module, args: tuple[Tensor]) -> None:
        norms[linear] += args[0].flatten(0, -2).float().square().sum(0)

    targets_STD = torch.empty_like(dense_STD)
    hooks = [linear.register_forward_pre_hook(add) for linear in norms]
    for batch in rows(0, SAMPLES + HELD_OUT):
        if batch.start == SAMPLES:
            for hook in hooks:
                hook.remove()
        with autocast():
            targets_STD[batch] = call_layer(layer, dense_STD[batch], call).float()
    return targets_STD, norms


def plain_fit(
    layer: nn.Module, call: LayerCall, inputs_STD: Tensor, targets_STD: Tensor, masks: ByMatrix, autocast: Autocast
) -> None:
    """16 steps; errors on calibration samples before and after, on held-out ones before, in the middle and after."""

    def run(batch: slice | Tensor) -> Tensor:
        with autocast():
            return call_layer(layer, inputs_STD[batch], call).float()

    def error(first: int, last: int) -> float:
        with torch.no_grad():
            return sum(functional.mse_loss(run(batch), targets_STD[batch]).item() for batch in rows(first, last))

    calibration, held_out = (0, HELD_OUT), (SAMPLES, SAMPLES + HELD_OUT)
    kept = [parameter.clone() for parameter in layer.parameters()]
    error(*calibration)
    curve = [error(*held_out)]
    layer.requires_grad_(True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    schedule = linear_with_warmup(optimizer, 2, SAMPLES // BATCH)
    for step, batch in enumerate(torch.randperm(SAMPLES).split(BATCH)):
        functional.mse_loss(run(batch), targets_STD[batch]).backward()
        for linear, mask in masks.items():
            linear.weight.grad.mul_(mask)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step + 1 in (8, 16):
            curve.append(error(*held_out))
    layer.requires_grad_(False)
    error(*calibration)
    if curve[-1] > curve[0]:
        for parameter, value in zip(layer.parameters(), kept, strict=True):
            parameter.copy_(value)


def plain_window(
    layer: nn.Module, call: LayerCall, dense_STD: Tensor, sparse_STD: Tensor | None, autocast: Autocast
) -> tuple[Tensor, Tensor | None]:
    """One window without a framework, in the passes that it needs and no others.

    Args:
        layer: The dense layer.
        call: Its arguments.
        dense_STD: Hidden states of the dense chain.
        sparse_STD: Those of the sparse one, on which it is trained; None: on the dense ones.
        autocast: The precision.

    Returns:
        The states after it, of both chains.
    """
    with torch.no_grad():
        targets_STD, norms = plain_targets(layer, call, dense_STD, autocast)
        masks = {}
        for linear in linears(layer):
            scores = linear.weight.abs() * norms[linear].sqrt()
            count = scores.shape[1] // 2
            lowest = np.partition(scores.numpy(), count - 1, axis=1)[:, count - 1 : count]
            masks[linear] = (scores > torch.from_numpy(lowest)).float()
            linear.weight.mul_(masks[linear])
    plain_fit(layer, call, dense_STD if sparse_STD is None else sparse_STD, targets_STD, masks, autocast)
    if sparse_STD is None:
        return targets_STD, None
    advanced_STD = torch.empty_like(sparse_STD)
    with torch.no_grad(), autocast():
        for batch in rows(0, SAMPLES + HELD_OUT):
            advanced_STD[batch] = call_layer(layer, sparse_STD[batch], call).float()
    return targets_STD, advanced_STD


def linears(layer: nn.Module) -> list[nn.Linear]:
    """The matrices of a layer."""
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


class Race(WalkCallback):
    """After each window of the walk, the plain loop does the same window, so that both see the same machine.

    Seconds are of the process's threads, which others on the machine do not lengthen.
    """

    def __init__(self, decoder: Decoder, session: Session, tokens_ST: Tensor, compute: Compute) -> None:
        chain = session.chain
        self.decoder, self.compute = decoder, compute
        self.dense_STD = chain.dense.states_STD.clone()
        self.sparse_STD = chain.sparse.states_STD.clone() if chain.sparse else None
        self.calls = decoder.calls(tokens_ST[:BATCH])
        self.seconds: list[tuple[float, float]] = []
        self.start = time.process_time()

    def on_window_end(self, window: Window, masks: Mapping[str, Tensor], results: Sequence[WindowResult]) -> None:
        """Time the plain loop against the window that the walk has just done."""
        done, index = time.process_time(), len(self.seconds)
        layer, call = self.decoder.layers[index], self.calls[index]
        self.dense_STD, self.sparse_STD = plain_window(
            layer, call, self.dense_STD, self.sparse_STD, self.compute.autocast
        )
        end = time.process_time()
        self.seconds.append((done - self.start, end - done))
        assert len(results[-1].tries) == 1, "the plain loop makes one"
        self.start = time.process_time()


class Opened(NamedTuple):
    """A session on the first windows of SmolLM2, and how it is walked over."""

    session: Session
    method: Method
    execution: Execution
    source: WheelModel
    tokens_ST: Tensor

    def walk(self, folder: Path, *callbacks: WalkCallback) -> None:
        """Walk over the windows."""
        settings = {"callbacks": callbacks, "logger": RunLogger(folder)}
        reconstruct(self.session, self.method, self.execution, Masks(), **settings)


def opened(folder: Path, *, inputs: str, windows: int) -> Opened:
    """A session as a default run has it, at one learning rate."""
    quiet()
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = hydra.compose("fit")
    source: WheelModel = hydra.utils.instantiate(cfg.model)
    trainer = hydra.utils.instantiate(cfg.trainer)
    compute = Compute.choose(trainer, "32-true")
    tokens_ST = torch.randint(0, 49152, (SAMPLES + HELD_OUT, LENGTH), generator=torch.Generator().manual_seed(0))
    module = functools.partial(
        MaskedWeights,
        optimizer=functools.partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0, fused=True),
        scheduler=linear_with_warmup,
        warmup=0.1,
        loss=mean_squared,
    )
    method = Method(
        pruning=PruningMethod(
            criterion=Wanda(), pattern=Unstructured(sparsity=0.5), prune_by="window", allow_unscored=False
        ),
        training=TrainingMethod(
            module=module,
            fitting=FitSettings(retry_rates=()),
            trainer=compute.trainers(trainer),
            schedule=Schedule(epochs=1, max_steps=-1, accumulate=1),
        ),
        windows=Partition(),
        propagation=Propagation(inputs=inputs),
    )
    execution = Execution(compute=compute, store=StoreSettings(), batch_size=BATCH, stop_after=windows)
    samples = Samples(tokens_ST[:SAMPLES], tokens_ST[SAMPLES:], tokens_ST[SAMPLES:], "random tokens")
    session = open_session(source.load(), samples, method, execution, activations=folder / "activations")
    return Opened(session, method, execution, source, tokens_ST)


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("inputs", ["sparse", "dense"])
def test_the_walk_takes_at_most_1_05_of_a_plain_loop_that_makes_the_needed_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: str
) -> None:
    monkeypatch.delenv("LIT_RECON_CACHE")  # SmolLM2 is expensive to fetch: the user's own cache
    made = opened(tmp_path, inputs=inputs, windows=WINDOWS)
    compute = made.execution.compute
    race = Race(Decoder(made.source.load(), compute.device), made.session, made.tokens_ST, compute)
    made.walk(tmp_path, race)
    print(f"\n{inputs} inputs: window, walk (s), plain loop (s), ratio")
    for index, (walked, plain) in enumerate(race.seconds):
        print(f"{index:2} {walked:6.2f} {plain:6.2f} {walked / plain:5.3f}")
    ratio = statistics.median(walked / plain for walked, plain in race.seconds[1:])
    print(f"median without the first: {ratio:.3f}")
    assert ratio <= 1.05


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.xfail(reason="not reached: 81% of the walk's time, 87% of that within operators")
def test_products_and_attention_are_85_percent_of_the_walks_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the wall time, that of the profiler itself included; the shares of the time within operators are printed."""
    monkeypatch.delenv("LIT_RECON_CACHE")
    opened(tmp_path, inputs="sparse", windows=1).walk(tmp_path)  # what is made once
    made = opened(tmp_path, inputs="sparse", windows=2)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        made.walk(tmp_path)
        seconds = time.perf_counter() - start
    by_name = {found.key: found.self_cpu_time_total / 1e6 for found in profiled.key_averages()}
    products = sum(by_name.get(name, 0) for name in PRODUCTS)
    attention = sum(found for name, found in by_name.items() if "scaled_dot_product" in name)
    computed = sum(by_name.values())
    print(f"\n{seconds:.1f} s, of which {computed / seconds:.1%} in operators")
    for name in sorted(by_name, key=by_name.__getitem__, reverse=True)[:12]:
        print(f"{by_name[name] / computed:6.1%} {name}")
    print(f"products {products / computed:.1%} and attention {attention / computed:.1%} of these")
    assert products + attention >= 0.85 * seconds


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.xfail(reason="not reached: 0.69; 0.46 where the dense model was measured by a run before")
def test_the_three_evaluations_of_a_first_run_take_at_most_half_as_long_as_its_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIT_RECON_CACHE")
    made = opened(tmp_path, inputs="sparse", windows=WINDOWS // 2)
    start = time.process_time()
    made.walk(tmp_path)
    walked = (time.process_time() - start) * len(made.session.windows) / (WINDOWS // 2)
    sequences = torch.randint(0, 49152, (EVALUATED // SHARE, 512), generator=torch.Generator().manual_seed(0))
    start = time.process_time()
    perplexity(made.session.model, sequences, compute=made.execution.compute)
    evaluated = (time.process_time() - start) * SHARE
    print(f"\nwalk {walked:.1f} s, an evaluation {evaluated:.1f} s; of the walk:")
    print(f"the pruned and the reconstructed model's {2 * evaluated / walked:.2f}")
    print(f"with the dense model's, which is measured once for all runs, {3 * evaluated / walked:.2f}")
    assert 3 * evaluated <= 0.5 * walked
