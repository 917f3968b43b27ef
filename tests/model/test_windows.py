"""Windows run their layers, halves and matrices, and know which parameters are theirs."""

from functools import partial

import torch
from conftest import CPU, assert_close
from torch import Tensor

from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import Decoder
from lit_recon.model.partition import layer_windows, partition
from lit_recon.model.windows import HalfWindow


@torch.no_grad()
def test_layers_of_a_window_can_be_run_in_part(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    (window,) = layer_windows(model, by="model")
    hidden_BTD, calls = Decoder(model, CPU.device).embed(tokens_ST)
    run = partial(window, calls=calls)
    whole_BTD = run(run(hidden_BTD, layers=slice(0, 2)), layers=slice(2, None))
    assert torch.equal(whole_BTD, run(hidden_BTD))


@torch.no_grad()
def test_a_window_of_experts_multiplies_each_row_by_its_own_expert() -> None:
    (window,) = [
        window for window in partition(tiny_model("mixtral"), by="matrix")[:6] if window.name.endswith("down_proj")
    ]
    rows_BTI = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    experts_BT = torch.tensor([[3, 0, 0, 1, 3], [1, 1, 3, 0, 3]])  # none to expert 2
    call = type("Call", (), {"kwargs": {"experts": experts_BT}})
    products_BTO = window(rows_BTI, [call])
    for batch in range(2):
        for token in range(5):
            expected_O = window.matrix.weight[experts_BT[batch, token]] @ rows_BTI[batch, token]
            assert_close(products_BTO[batch, token], expected_O)


def test_a_half_has_only_the_parameters_that_it_uses_as_its_own() -> None:
    first, second = layer_windows(tiny_model("llama"), by="half")[:2]
    assert isinstance(first, HalfWindow) and isinstance(second, HalfWindow)
    sides = [[parameter.shape for parameter in window.own_parameters()] for window in (first, second)]
    assert sides == [[(32, 32), (16, 32), (16, 32), (32, 32), (32,)], [(48, 32), (48, 32), (32, 48), (32,)]]
    assert [matrix.name for matrix in second.matrices()] == [
        f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    ]


def test_a_parallel_layers_halves_branch_and_a_sequential_ones_do_not() -> None:
    assert [window.parallel_half for window in layer_windows(tiny_model("phi"), by="half")] == ["first", "second"] * 3
    assert {window.parallel_half for window in layer_windows(tiny_model("llama"), by="half")} == {None}
    assert {window.has_shared_norms for window in layer_windows(tiny_model("gpt_neox"), by="half")} == {False}
    assert [window.has_shared_norms for window in layer_windows(tiny_model("phi"), by="half")] == [False, True] * 3
