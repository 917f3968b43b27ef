"""The walk against a plain PyTorch loop that does the same work, on the first windows of SmolLM2: ratio in one run.

pytest -m slow tests/benchmarks -s
"""

import functools
import statistics
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import StoreSettings
from lit_recon.data.source import Samples
from lit_recon.fit.job import Execution, Method, PruningMethod, Schedule, TrainingMethod
from lit_recon.fit.session import open_session, reconstruct
from lit_recon.model.decoder import Decoder, call_layer
from lit_recon.model.partition import Partition
from lit_recon.model.wheels import WheelModel
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
from lit_recon.system.device import Compute
from lit_recon.system.quiet_libraries import quiet

WINDOWS, SAMPLES, HELD_OUT, LENGTH, BATCH, RATE = 8, 32, 4, 256, 2, 2e-3


def plain_window(layer: torch.nn.Module, call, inputs_STD: torch.Tensor, autocast) -> torch.Tensor:
    """Teacher pass with Wanda's statistics, pruning, 16 steps, held-out losses; returns the targets. No framework."""
    linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    norms = {linear: torch.zeros(linear.in_features) for linear in linears}

    def add(module, args):
        norms[module] += args[0].flatten(0, -2).float().square().sum(0)

    def run(rows):
        with autocast():
            return call_layer(layer, inputs_STD[rows], call).float()

    def held_out() -> float:
        with torch.no_grad():
            rows = [slice(start, start + BATCH) for start in range(SAMPLES, SAMPLES + HELD_OUT, BATCH)]
            return sum(functional.mse_loss(run(row), targets_STD[row]).item() for row in rows)

    targets_STD = torch.empty_like(inputs_STD)
    hooks = [linear.register_forward_pre_hook(add) for linear in linears]
    with torch.no_grad():
        for start in range(0, SAMPLES + HELD_OUT, BATCH):
            if start == SAMPLES:
                for hook in hooks:
                    hook.remove()
            targets_STD[start : start + BATCH] = run(slice(start, start + BATCH))
        masks = {}
        for linear in linears:
            scores = linear.weight.abs() * norms[linear].sqrt()
            threshold = scores.kthvalue(scores.shape[1] // 2, dim=1, keepdim=True).values
            masks[linear] = (scores > threshold).float()
            linear.weight.mul_(masks[linear])
    kept = [parameter.clone() for parameter in layer.parameters()]
    # What the walk measures beside training: errors before, at the start, in the middle, at the end and after.
    before = held_out() + held_out() + held_out()
    layer.requires_grad_(True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    schedule = linear_with_warmup(optimizer, 2, SAMPLES // BATCH)
    for step, rows in enumerate(torch.randperm(SAMPLES).split(BATCH)):
        loss = functional.mse_loss(run(rows), targets_STD[rows])
        loss.backward()
        for linear in linears:
            linear.weight.grad.mul_(masks[linear])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step + 1 in (8, 16):
            held_out()
    layer.requires_grad_(False)
    after = held_out() + held_out()
    if after / 2 > before / 3:
        for parameter, value in zip(layer.parameters(), kept, strict=True):
            parameter.copy_(value)
    return targets_STD


class Race(WalkCallback):
    """After each window of the walk, the plain loop does the same window, so that both see the same machine."""

    def __init__(self, decoder: Decoder, inputs_STD: torch.Tensor, tokens_ST: torch.Tensor, compute: Compute) -> None:
        self.decoder, self.inputs_STD, self.compute = decoder, inputs_STD, compute
        self.calls = decoder.calls(tokens_ST[:BATCH])
        self.ratios: list[float] = []
        self.start = time.perf_counter()

    def on_window_fit(self, result: WindowResult) -> None:
        """Time the plain loop against the window that the walk has just done."""
        done, index = time.perf_counter(), len(self.ratios)
        self.inputs_STD = plain_window(
            self.decoder.layers[index], self.calls[index], self.inputs_STD, self.compute.autocast
        )
        end = time.perf_counter()
        self.ratios.append((done - self.start) / (end - done))
        self.start = time.perf_counter()


@pytest.mark.slow
def test_a_plain_loop_is_at_most_ten_percent_faster_than_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIT_RECON_CACHE")  # SmolLM2 is expensive to fetch: the user's own cache
    quiet()
    import hydra

    from lit_recon.settings.conf import CONF

    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = hydra.compose("fit")
    source: WheelModel = hydra.utils.instantiate(cfg.model)
    trainer = hydra.utils.instantiate(cfg.trainer)
    compute = Compute.choose(trainer, "auto")
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
            fitting=FitSettings(),
            trainer=compute.trainers(trainer),
            schedule=Schedule(epochs=1, max_steps=-1, accumulate=1),
        ),
        windows=Partition(),
        propagation=Propagation(inputs="dense"),
    )
    execution = Execution(compute=compute, store=StoreSettings(), batch_size=BATCH, stop_after=WINDOWS)
    samples = Samples(tokens_ST[:SAMPLES], tokens_ST[SAMPLES:], tokens_ST[SAMPLES:], "random tokens")
    session = open_session(source.load(), samples, method, execution, activations=tmp_path / "activations")
    plain = Decoder(source.load(), compute.device)
    race = Race(plain, session.chain.inputs_STD.clone(), tokens_ST, compute)
    reconstruct(session, method, execution, Masks(), callbacks=[race], logger=RunLogger(tmp_path))
    ratios = race.ratios
    print("walk / plain loop per window:", " ".join(f"{ratio:.2f}" for ratio in ratios))  # noqa: T201
    assert statistics.median(ratios[1:]) <= 1 / 0.9
