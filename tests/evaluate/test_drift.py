"""Drift is the relative error of each matrix's output, with dense inputs and with the sparse model's own."""

import copy
import logging

import pytest
import torch
from conftest import CPU
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_recon.evaluate.drift import MatrixDrift, RelativeError, drift_of_layers, measure_drift
from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import decoder_layers


def halved(model: PreTrainedModel, only: str = "") -> PreTrainedModel:
    """A copy without every second weight of each matrix of its layers whose name holds `only`."""
    sparse = copy.deepcopy(model)
    prefix, layers = decoder_layers(sparse)
    for name, parameter in layers.named_parameters(prefix=prefix):
        if parameter.dim() >= 2 and only in name:
            parameter.view(-1)[::2] = 0
    return sparse


def linear_inputs(model: PreTrainedModel, tokens_ST: Tensor) -> dict[str, Tensor]:
    """What every linear module of the layers is called with in a pass of the whole model, as rows."""
    found: dict[str, Tensor] = {}
    prefix, layers = decoder_layers(model)
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: found.__setitem__(f"{name}.weight", args[0].flatten(0, -2))
        )
        for name, module in layers.named_modules(prefix=prefix)
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    with torch.no_grad():
        model(tokens_ST, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def expected(dense: PreTrainedModel, sparse: PreTrainedModel, tokens_ST: Tensor) -> dict[str, tuple[float, ...]]:
    """The definition, in float64: mean and worst token, local and accumulated."""
    inputs, others, found = linear_inputs(dense, tokens_ST), linear_inputs(sparse, tokens_ST), {}
    for name, x_NI in inputs.items():
        weights = [model.get_parameter(name).double() for model in (dense, sparse)]
        is_linear = isinstance(dense.get_submodule(name.removesuffix(".weight")), nn.Linear)
        before, after = (weight.T if is_linear else weight for weight in weights)
        y_NO = x_NI.double() @ before
        errors = [x_NI.double() @ after - y_NO, others[name].double() @ after - y_NO]
        relative = [error_NO.square().sum(1) / y_NO.square().sum(1).mean() for error_NO in errors]
        found[name] = tuple(value for error_N in relative for value in (error_N.mean().item(), error_N.max().item()))
    return found


def flat(drift: MatrixDrift) -> tuple[float, ...]:
    assert drift.accumulated is not None
    return drift.local.mean, drift.local.max, drift.accumulated.mean, drift.accumulated.max


@pytest.mark.parametrize("shape", ["llama", "gemma2", "gpt2", "opt"])
def test_drift_is_that_of_its_definition_on_whole_models(shape: str, tokens_ST: Tensor) -> None:
    dense = tiny_model(shape)
    sparse = halved(dense)
    wanted = expected(dense, sparse, tokens_ST)
    found = measure_drift(dense, sparse, tokens_ST, CPU, batch_size=4)
    assert [drift.matrix for drift in found] == [name for name in dense.state_dict() if name in wanted]
    for drift in found:
        assert flat(drift) == pytest.approx(wanted[drift.matrix], rel=1e-4), drift.matrix


def test_where_one_matrix_is_changed_nothing_before_it_drifts_and_all_behind_it_does(tokens_ST: Tensor) -> None:
    dense = tiny_model("llama")
    sparse = halved(dense, only="layers.1.self_attn.o_proj")
    seen_changed = False
    for drift in measure_drift(dense, sparse, tokens_ST, CPU, batch_size=6):
        assert drift.accumulated is not None
        if drift.matrix == "model.layers.1.self_attn.o_proj.weight":
            seen_changed = True
            assert drift.local.mean > 0 and flat(drift)[2:] == pytest.approx(flat(drift)[:2], rel=1e-5)
        else:
            assert drift.local == RelativeError(0, 0), drift.matrix
            assert (drift.accumulated.mean > 0) == seen_changed, drift.matrix


def test_by_hand_one_token_is_worse_than_the_mean() -> None:
    dense, tokens_ST = tiny_model("llama", num_hidden_layers=1), torch.tensor([[3, 5]])
    weight_OI = dense.model.layers[0].self_attn.q_proj.weight
    weight_OI.copy_(torch.eye(32))
    sparse = copy.deepcopy(dense)
    sparse.model.layers[0].self_attn.q_proj.weight[0, 0] = 0  # the output of one feature is lost
    x_NI = linear_inputs(dense, tokens_ST)["model.layers.0.self_attn.q_proj.weight"]
    first, energy = x_NI[:, 0].square(), x_NI.square().sum(1).mean()
    drift = measure_drift(dense, sparse, tokens_ST, CPU)[0]
    assert (drift.matrix, drift.layer, drift.kind) == (
        "model.layers.0.self_attn.q_proj.weight",
        0,
        "self_attn.q_proj",
    )
    assert drift.local.mean == pytest.approx((first.mean() / energy).item(), rel=1e-5)
    assert drift.local.max == pytest.approx((first.max() / energy).item(), rel=1e-5)
    assert drift.local.max > drift.local.mean


def test_batches_change_nothing_and_padding_is_not_seen(tokens_ST: Tensor, padded_ST: Tensor) -> None:
    dense = tiny_model("llama")
    sparse = halved(dense)
    one, all_together = (measure_drift(dense, sparse, tokens_ST, CPU, batch_size=size) for size in (1, 6))
    for drift, other in zip(one, all_together, strict=True):
        assert flat(drift) == pytest.approx(flat(other), rel=1e-4)
    texts = [sample_T[sample_T >= 0] for sample_T in padded_ST]
    sums = [expected(dense, sparse, text_T[None]) for text_T in texts]
    inputs = [linear_inputs(dense, text_T[None]) for text_T in texts]
    name = "model.layers.2.mlp.down_proj.weight"
    energies = [(x[name] @ dense.get_parameter(name).T).square().sum().item() for x in inputs]  # weights of the means
    drift = next(drift for drift in measure_drift(dense, sparse, padded_ST, CPU, batch_size=3) if drift.matrix == name)
    means = [sum(one[name][kind] * e for one, e in zip(sums, energies, strict=True)) / sum(energies) for kind in (0, 2)]
    assert (flat(drift)[0], flat(drift)[2]) == pytest.approx(means, rel=1e-4)


@pytest.mark.parametrize("shape", ["mixtral", "gpt_oss", "llama4"])
def test_experts_are_measured_by_the_tokens_that_reach_them_in_the_dense_model_alone(
    shape: str, tokens_ST: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    dense = tiny_model(shape)
    sparse = copy.deepcopy(dense)
    prefix, layers = decoder_layers(sparse)
    experts = {name: one for name, one in layers.named_parameters(prefix=prefix) if one.dim() == 3}
    for parameter in experts.values():
        parameter.mul_(0.5)  # half of each output is lost, whatever the inputs
    with caplog.at_level(logging.INFO):
        found = {drift.matrix: drift for drift in measure_drift(dense, sparse, tokens_ST, CPU, batch_size=4)}
    assert set(experts) <= set(found)
    for name in experts:
        assert found[name].accumulated is None
        assert found[name].local.mean == pytest.approx(0.25, rel=1e-5)
        assert found[name].as_json()["accumulated"] is None
    assert f"accumulated drift of {len(experts)} matrices of experts is left out" in caplog.text
    assert all(drift.accumulated for name, drift in found.items() if name not in experts)


def test_layers_are_told_one_after_the_other_and_models_stay_as_they_were(tokens_ST: Tensor) -> None:
    dense = tiny_model("llama").bfloat16()
    sparse = halved(dense)
    before = {name: one.clone() for name, one in [*dense.state_dict().items(), *sparse.state_dict().items()]}
    layers = list(drift_of_layers(dense, sparse, tokens_ST, CPU, batch_size=6))
    assert [{drift.layer for drift in layer} for layer in layers] == [{0}, {1}, {2}]
    assert [len(layer) for layer in layers] == [7, 7, 7]
    after = {name: one for name, one in [*dense.state_dict().items(), *sparse.state_dict().items()]}
    assert all(one.dtype == torch.bfloat16 and torch.equal(one, before[name]) for name, one in after.items())


def test_what_is_not_finite_is_told_and_not_hidden_by_the_maximum(tokens_ST: Tensor) -> None:
    dense = tiny_model("llama")
    sparse = halved(dense)
    sparse.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    found = {drift.matrix: drift for drift in measure_drift(dense, sparse, tokens_ST, CPU, batch_size=6)}
    local = found["model.layers.0.mlp.up_proj.weight"].local
    assert local.mean != local.mean and local.max != local.max


def test_models_of_other_shapes_are_refused_before_anything_is_measured(tokens_ST: Tensor) -> None:
    with pytest.raises(ValueError, match=r"9 matrices differ, such as 0\.mlp\.down.*\(32, 48\) in dense.*give the"):
        measure_drift(tiny_model("llama"), tiny_model("llama", intermediate_size=40), tokens_ST, CPU)
    with pytest.raises(ValueError, match=r"7 matrices differ, such as 2\.mlp.*none in checkpoint"):
        measure_drift(tiny_model("llama"), tiny_model("llama", num_hidden_layers=2), tokens_ST, CPU)
