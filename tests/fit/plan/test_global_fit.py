"""Copies that a fit holds of what it trains: as many bytes in the plan as there are, of a layer and of all at once."""

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import CPU, Ended, chain_of, masks_of, module, trainer
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lit_recon.activations.store import Needed
from lit_recon.fit.job import Schedule
from lit_recon.fit.plan import estimate, memory_limit, peak_memory
from lit_recon.fit.plan.estimate import Plan, Workload, make_plan
from lit_recon.fit.plan.layer_profile import LayerProfile, profile
from lit_recon.fit.session import Session
from lit_recon.model.architectures import tiny_model
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import Partition
from lit_recon.model.verify import verify
from lit_recon.modules.mask_lora import MaskLora
from lit_recon.modules.norms_biases import NormsBiases
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.masks import Masks
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner, prune
from lit_recon.reconstruction.driver import walk
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.reconstruction.retraining import Retraining, open_retraining, retrain
from lit_recon.reconstruction.window_fit import WindowFitter
from lit_recon.system.clock import Clock

MODULES: Mapping[str, dict[str, Any]] = {
    "masked_weights": {},
    "norms_biases": {"cls": NormsBiases},
    "mask_lora": {"cls": MaskLora, "rank": 2},
}
ADAPTERS = 2 * (2 * (32 + 32) + 2 * (16 + 32) + 3 * (48 + 32))  # of a layer
TRAINED = {"masked_weights": 7680 + 2 * 32, "norms_biases": 2 * 32, "mask_lora": ADAPTERS + 2 * 32}
TOKENS_ST = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0))
ONCE = Schedule(epochs=1, max_steps=-1, accumulate=1)


class Counted(Callback):
    """Counts the bytes of all tensors at the end of a step, and of what autograd keeps before its backward.

    Without numbers, which are logged.
    """

    bytes = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.saved: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            self.saved.append(tensor.detach())  # the tensor itself would keep the graph for ever
            return self.saved[-1]

        self.hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept)
        self.hooks.__enter__()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.hooks.__exit__(None, None, None)
        self.before = size(self.saved)
        self.saved.clear()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        gc.collect()
        self.bytes = self.before + size(one for one in gc.get_objects() if isinstance(one, Tensor))


def size(tensors: Iterable[Tensor]) -> int:
    storages = [one.untyped_storage() for one in tensors if one.numel() > 1]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def opened() -> Session:
    """A tiny model in float32, cut into layers, which are trained at once after the walk."""
    model = tiny_model("llama")
    matrices, chain = verify(model, TOKENS_ST), chain_of(model, TOKENS_ST, 4)
    pruner, weights = Pruner(Magnitude(), Unstructured(sparsity=0.5), chain), WeightOffloader(model, CPU.device)
    retrained = open_retraining(Retraining(), chain.passes, matrices, weights)
    return Session(
        model, matrices, Partition().cut(model, matrices), chain, pruner, weights, Clock(), retrained=retrained
    )


def bytes_in(scope: str, make: Callable[..., LightningModule], keep: str) -> int:
    """Bytes of all tensors that there are in a fit of the first layer, or of all at once."""
    session, counted = opened(), Counted()
    fitter = WindowFitter(
        make,
        trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0),
        device=CPU.device,
        seed=0,
        fitting=FitSettings(retry_rates=(), keep=keep),
        callbacks=[counted],
    )
    if scope == "layer":
        walk(session.windows[:1], chain=session.chain, pruner=session.pruner, fitter=fitter, weights=session.weights)
    else:
        (window,) = Partition(by="model").cut(session.model, session.matrices)
        masks = masks_of(session.pruner, window)
        prune(window, masks)
        assert session.retrained is not None
        retrain(session.retrained, Masks.pack(masks), fitter=fitter, weights=session.weights)
    return counted.bytes


def planned(make: Callable[..., LightningModule], **kept: bool) -> Plan:
    work = Workload(ONCE, evaluation_tokens=24, module=make, retraining=ONCE, **kept)
    return make_plan(opened(), work, kind="block", batch_size=2, array_bytes=Needed(0, 0))


@pytest.mark.parametrize(
    ("name", "keep", "anchor"),
    [
        ("masked_weights", "best", 0.0),
        ("masked_weights", "last", 0.1),
        ("norms_biases", "best", 0.1),
        ("mask_lora", "best", 0.1),
    ],
)
def test_copies_of_what_is_trained_are_counted_as_they_are(
    monkeypatch: pytest.MonkeyPatch, name: str, keep: str, anchor: float
) -> None:
    def without_activations(*arguments: Any) -> LayerProfile:
        return replace(profile(*arguments), saved_bytes=0)

    monkeypatch.setattr(estimate, "profile", without_activations)
    monkeypatch.setattr(peak_memory, "_resident", lambda *_: (0, 0))  # what this process has is another at each look
    monkeypatch.setattr(peak_memory, "head_bytes", lambda *_, **__: (0, 0))  # an evaluation takes more than a layer
    make, usual = (module(1e-3, anchor=one, **MODULES[name]) for one in (anchor, 0.0))
    plan, less = planned(make, keeps_best=keep == "best", is_anchored=anchor > 0), planned(usual)
    more = {"layer": plan.own_by_kind["block"] - less.own_by_kind["block"]}
    more["all"] = plan.global_fit.own_bytes - less.global_fit.own_bytes
    for scope, predicted in more.items():
        assert predicted == bytes_in(scope, make, keep) - bytes_in(scope, usual, "last") > 0, scope
    trained, best, anchored = TRAINED[name], keep == "best", anchor > 0
    adapters = ADAPTERS if name == "mask_lora" else 0  # of their start there is a copy in any case
    assert more["all"] == 3 * 4 * ((trained - adapters) * best + 2 * trained * anchored)
    of_matrices = plan.own_by_kind["matrix"] - less.own_by_kind["matrix"]
    assert of_matrices == (best + 2 * anchored) * 4 * 32 * 48, "the largest one"
    states = 3 * best  # in two commits, and in one that is written
    assert plan.disk_bytes - less.disk_bytes == states * 3 * 4 * trained


def test_what_a_fit_holds_is_planned_by_the_settings(
    tiny_run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def noted(session: Session, work: Workload, **settings: Any) -> Plan:
        found.append((work.keeps_best, work.is_anchored))
        return make_plan(session, work, **settings)

    monkeypatch.setattr(memory_limit, "make_plan", noted)
    for settings in ((), ("keep=best",), ("module=mask_lora", "module.rank=2", "module.anchor=0.1")):
        ended = tiny_run("walk=global", "plan=true", *settings)
        assert ended.status == 0, ended
    assert found == [(False, False), (True, False), (False, True)]
