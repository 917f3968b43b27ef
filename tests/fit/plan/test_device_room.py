"""Room on a GPU: counted by hand from the sizes of windows, above what training was seen to take."""

import torch
from conftest import chain_of
from torch import Tensor

from lit_recon.fit.plan.device_room import samples_per_pass, training_room
from lit_recon.fit.plan.layer_profile import profile
from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import partition
from lit_recon.modules.masked_weights import MaskedWeights

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_training_takes_24_bytes_per_parameter_and_16_per_feature_of_a_matrix_and_token() -> None:
    windows = partition(tiny_model("llama"))  # hidden size 32, MLP 48, 4 heads, 2 of keys and values
    matrices = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    parameters = sum(inputs * outputs for inputs, outputs in matrices) + 2 * 32
    assert training_room(windows, 10) == 24 * parameters + 16 * 10 * sum(map(sum, matrices))
    (whole,) = partition(tiny_model("llama"), by="model")
    assert training_room([whole], 10) == 3 * training_room(windows, 10)


def test_what_a_layer_is_seen_to_take_is_less_than_the_room_for_it(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    chain, windows = chain_of(model, tokens_ST, 4), partition(model)
    seen = profile(windows[0], chain, 2, MaskedWeights)
    masters = 4 * seen.parameters
    assert masters + seen.training_bytes + seen.saved_bytes < 1.3 * training_room(windows, 2 * tokens_ST.shape[1])


def test_a_gpu_runs_as_many_samples_at_once_as_gradient_and_moments_leave_room_for_and_a_cpu_one_batch() -> None:
    windows = partition(tiny_model("llama"))
    parameters = sum(one.numel() for one in windows[0].parameters())
    tokens = 12 * parameters // (16 * 80)  # the widest matrix has 32 + 48 features
    assert samples_per_pass(windows, 2, 10, GPU) == tokens // 10 > 2
    assert samples_per_pass(windows, 2, 10**6, GPU) == 2, "never less than in training"
    assert samples_per_pass(windows, 2, 10, CPU) == 2
