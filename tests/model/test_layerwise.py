"""A forward with one layer at a time on the device ends in the model's own final states."""

import pytest
import torch
from conftest import CPU
from torch import Tensor

from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import Decoder
from lit_recon.model.layerwise import final_states, place_of_states


def test_final_states_are_those_in_front_of_the_models_own_final_norm(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    seen: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens_ST, use_cache=False)
    handle.remove()
    states_STD = final_states(Decoder(model, CPU.device), tokens_ST, batch_size=4, compute=CPU)
    torch.testing.assert_close(states_STD, seen[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("free", "place"), [(200, "cuda"), (199, "cpu")])
def test_hidden_states_are_on_a_gpu_where_half_of_what_is_free_holds_them(
    free: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
    assert place_of_states(100, torch.device("cuda", 0)).type == place
    assert place_of_states(100, torch.device("cpu")).type == "cpu"
