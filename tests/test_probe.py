"""What one batch tells of a layer's matrices; the rest is in the plans of test_fit.py and test_budget.py."""

import pytest
import torch
from conftest import chain_of

from lit_recon.architectures import tiny_model
from lit_recon.partition import layer_windows
from lit_recon.probe import observe


@pytest.mark.parametrize(("shape", "per_token"), [("llama", 1), ("mixtral", 2)])
def test_each_matrix_is_given_its_rows_and_some_share_them(shape: str, per_token: int) -> None:
    tokens_ST = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0))
    model = tiny_model(shape)
    leaders, rows = observe(layer_windows(model)[1], chain_of(model, tokens_ST, 4))
    prefix = "model.layers.1."
    q, k, v, o = (f"{prefix}self_attn.{side}_proj.weight" for side in "qkvo")
    assert {q, o} <= leaders and not {k, v} & leaders
    assert [rows[name] for name in (q, k, v, o)] == [6 * 24] * 4
    wide = f"{prefix}mlp.down_proj.weight" if shape == "llama" else f"{prefix}mlp.experts.down_proj"
    assert rows[wide] == per_token * 6 * 24
