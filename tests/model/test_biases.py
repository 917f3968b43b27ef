"""Biases that a model is given: zeros, where its configuration has a switch, and loaded again by transformers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_recon.model.architectures import tiny_model
from lit_recon.model.biases import add_biases


def test_a_llama_is_given_biases_that_transformers_loads_again(tokens_BT: Tensor, tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = model(tokens_BT).logits
    assert sorted(add_biases(model)) == ["attention_bias", "mlp_bias"]
    biases = [one for name, one in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 7 * model.config.num_hidden_layers and not any(one.any() for one in biases)
    assert torch.equal(model(tokens_BT).logits, before)
    for one in biases:
        one += 0.1
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read(tokens_BT).logits, model(tokens_BT).logits)


@pytest.mark.parametrize("shape", ["phi3", "gpt2"])
def test_a_model_without_a_switch_is_refused(shape: str) -> None:
    model = tiny_model(shape)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"module\.add_biases=true: the configuration of .* has no switch"):
        add_biases(model)
    assert [name for name, _ in model.named_parameters()] == names
