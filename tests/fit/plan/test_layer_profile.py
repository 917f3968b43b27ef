"""What one batch tells of a layer's matrices; the rest is in the plans of runs/test_fit.py and test_memory_limit.py."""

from dataclasses import replace

import pytest
import torch
from conftest import CPU, chain_of

from lit_recon.activations.chain import Chain
from lit_recon.activations.store import Needed
from lit_recon.fit.job import Schedule
from lit_recon.fit.plan import estimate
from lit_recon.fit.plan.layer_profile import LayerProfile, profile, rows_per_matrix
from lit_recon.fit.session import Session
from lit_recon.model.architectures import tiny_model
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import Partition, layer_windows
from lit_recon.model.verify import verify
from lit_recon.model.windows import Window
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner
from lit_recon.system.clock import Clock


@pytest.mark.parametrize(("shape", "per_token"), [("llama", 1), ("mixtral", 2)])
def test_each_matrix_is_given_its_rows_and_some_share_them(shape: str, per_token: int) -> None:
    tokens_ST = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0))
    model = tiny_model(shape)
    leaders, rows = rows_per_matrix(layer_windows(model)[1], chain_of(model, tokens_ST, 4), 2)
    prefix = "model.layers.1."
    q, k, v, o = (f"{prefix}self_attn.{side}_proj.weight" for side in "qkvo")
    assert {q, o} <= leaders and not {k, v} & leaders
    assert [rows[name] for name in (q, k, v, o)] == [6 * 24] * 4
    wide = f"{prefix}mlp.down_proj.weight" if shape == "llama" else f"{prefix}mlp.experts.down_proj"
    assert rows[wide] == per_token * 6 * 24


def test_windows_are_planned_by_the_largest_of_their_kind_also_where_the_first_layer_is_unlike_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_activations(window: Window, chain: Chain, batch_size: int, module: None) -> LayerProfile:
        return replace(profile(window, chain, batch_size, module), saved_bytes=0)

    monkeypatch.setattr(estimate, "profile", without_activations)
    tokens_ST = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0))
    model = tiny_model("deepseek_v3")  # a dense layer, then mixtures
    matrices, chain = verify(model, tokens_ST), chain_of(model, tokens_ST, 4)
    pruner = Pruner(Magnitude(), Unstructured(sparsity=0.5), chain)
    work = estimate.Workload(Schedule(epochs=1, max_steps=-1, accumulate=1), evaluation_tokens=24, needs_gram=False)
    sizes = {
        kind: [
            sum(parameter.numel() for parameter in window.own_parameters()) for window in layer_windows(model, by=kind)
        ]
        for kind in ("half", "block")
    }
    assert max(sizes["half"]) not in sizes["half"][:2] and max(sizes["block"]) != sizes["block"][0]
    for kind in sizes:
        windows, weights = Partition(by=kind).cut(model, matrices), WeightOffloader(model, CPU.device)
        session = Session(model, matrices, windows, chain, pruner, weights, Clock())
        peaks = estimate.make_plan(session, work, kind=kind, batch_size=2, array_bytes=Needed(0, 0)).peaks_by_kind
        # In float32 the weight, its gradient, two moments, a mask, and the pruned weight; a boolean mask.
        assert peaks["block"] - peaks["half"] == (6 * 4 + 1) * (max(sizes["block"]) - max(sizes["half"]))
