"""Rates relative to the weights, and the groups of parameters of an optimizer."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lit_recon.modules.rates import PROBE, REFERENCE, is_probed, make_optimizer, relative_rates


def parameters_of(*values: object) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(value)) for value in values]


MATRIX, NORM, BIAS, ZEROS = [[3.0, 0.0], [0.0, -4.0]], [30.0, 40.0], [0.1, 0.7], [[0.0, 0.0]]
RMS = {"matrix": 12.5**0.5, "norm": 1250**0.5, "bias": 0.5}  # of what is not zero


def test_a_rate_is_a_share_of_the_root_mean_square_of_what_pruning_left_of_the_median_matrix() -> None:
    larger = (10 * torch.tensor(MATRIX)).tolist()
    found = relative_rates(parameters_of(MATRIX, larger, larger, ZEROS, NORM, BIAS))
    assert found == pytest.approx([REFERENCE * 10 * RMS["matrix"]] * 6)
    scaled = relative_rates([1000 * one.detach().bfloat16().float() for one in parameters_of(MATRIX)])
    assert scaled == pytest.approx([1000 * REFERENCE * RMS["matrix"]])


def test_where_no_matrix_is_trained_norms_and_biases_are_what_is_usual() -> None:
    assert relative_rates(parameters_of(NORM, BIAS, NORM)) == pytest.approx([REFERENCE * RMS["norm"]] * 3)
    assert relative_rates(parameters_of(ZEROS)) == [REFERENCE]
    assert relative_rates([]) == []


def test_a_parameter_with_a_size_of_its_own_has_a_rate_by_that() -> None:
    matrix, norm = parameters_of(MATRIX, NORM)
    assert relative_rates([matrix, norm], {matrix: 7.0}) == pytest.approx([REFERENCE * 7.0] * 2)
    other = nn.Parameter(torch.tensor(MATRIX))
    found = relative_rates([matrix, other, norm], {matrix: 7.0})
    assert found[0] == pytest.approx(REFERENCE * 7.0)
    assert found[1] == found[2] == pytest.approx(REFERENCE * (7.0 + RMS["matrix"]) / 2)


@pytest.mark.parametrize("decay", [{"weight_decay": 0.1}, {}], ids=["decay", "the class's own decay"])
def test_norms_and_biases_are_in_a_group_of_their_own_that_does_not_decay(decay: dict[str, float]) -> None:
    matrix, norm, other, bias = parameters_of(MATRIX, NORM, ZEROS, BIAS)
    optimizer = make_optimizer(partial(torch.optim.AdamW, lr=1e-3, **decay), [matrix, norm, other, bias])
    groups = [(group["params"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert groups == [([matrix, other], 1e-3, decay.get("weight_decay", 0.01)), ([norm, bias], 1e-3, 0.0)]
    for one in (matrix, norm, other, bias):
        one.grad = torch.zeros_like(one)
    optimizer.step()
    assert torch.equal(norm, torch.tensor(NORM)) and not torch.equal(matrix, torch.tensor(MATRIX))


def test_what_knows_no_decay_is_given_none_and_what_has_no_members_no_group() -> None:
    matrix, norm = parameters_of(MATRIX, NORM)

    def make(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1.0)

    assert [group["params"] for group in make_optimizer(make, [norm, matrix]).param_groups] == [[matrix], [norm]]
    assert len(make_optimizer(make, [matrix]).param_groups) == len(make_optimizer(make, [norm]).param_groups) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_the_first_step_of_a_probed_rate_changes_each_parameter_by_a_share_of_the_matrix(fused: bool) -> None:
    given = parameters_of(MATRIX, NORM, BIAS)
    make = partial(torch.optim.AdamW, lr="probe", eps=1e-15, weight_decay=0.0, fused=fused)
    optimizer = make_optimizer(make, given)
    before: list[Tensor] = [one.detach().clone() for one in given]
    for one in given:
        one.grad = torch.full_like(one, 1e-12)  # AdamW's first step does not depend on the size
    optimizer.step()
    for one, start in zip(given, before, strict=True):
        step = torch.full_like(start, REFERENCE * RMS["matrix"])
        torch.testing.assert_close(start - one, step, rtol=1e-2, atol=1e-5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0] * 3


def test_a_probe_is_seen_through_partial_calls() -> None:
    probed, fixed = (partial(torch.optim.AdamW, lr=lr) for lr in ("probe", 1e-3))
    assert is_probed(partial(partial(dict, optimizer=probed), warmup=0.1))
    assert not is_probed(partial(dict, optimizer=fixed)) and not is_probed(partial(dict)) and not is_probed(dict)


@pytest.mark.skipif(not hasattr(torch.optim, "Adafactor"), reason="this torch has no Adafactor")
def test_an_optimizer_whose_steps_are_shares_of_the_weights_is_not_scaled_by_them_twice() -> None:
    weights = [torch.nn.Parameter(torch.full((4, 4), size)) for size in (0.5, 5.0)]
    optimizer = make_optimizer(partial(torch.optim.Adafactor, lr=PROBE), weights)
    assert [group["lr"] for group in optimizer.param_groups] == [REFERENCE, REFERENCE]
