"""Biases where a model has none: zeros, as its configuration provides for, so that transformers loads the checkpoint.

Which switches of a configuration add biases is tried out on a model without weights: those that are false, are named
so, and add biases to products in the layers and change nothing else.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_recon.model.decoder import decoder_layers


def add_biases(model: PreTrainedModel) -> list[str]:
    """Add zero biases to products in the layers of a model, or of its skeleton, and say so in its configuration.

    Returns:
        The names of the switches.

    Raises:
        ValueError: Its configuration has no switch that adds any.
    """
    found = {}
    for switch in [name for name, value in _settings(model).items() if name.endswith("bias") and value is False]:
        added = _added_by(model, switch)
        if added:
            found[switch] = added
    if not found:
        raise ValueError(
            f"module.add_biases=true: the configuration of {type(model).__name__} has no switch, such as "
            "attention_bias, that adds biases to its layers: transformers would not load them; leave it out."
        )
    for switch, added in found.items():
        setattr(model.config.get_text_config(), switch, True)
        for name, size in added.items():
            owner = model.get_submodule(name.removesuffix(".bias"))
            weight = owner.weight
            assert isinstance(weight, torch.Tensor)
            owner.bias = nn.Parameter(torch.zeros(size, dtype=weight.dtype, device=weight.device), requires_grad=False)
    return list(found)


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    return vars(model.config.get_text_config())


def _added_by(model: PreTrainedModel, switch: str) -> dict[str, torch.Size]:
    """Biases of products in the layers that a switch adds, with their sizes; none where it changes anything else."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    config = deepcopy(model.config)
    setattr(config.get_text_config(), switch, True)
    try:
        with torch.device("meta"):
            other = type(model)._from_config(config)
    except Exception:  # a switch of something else
        return {}
    found = {name: parameter.shape for name, parameter in other.named_parameters()}
    added = {name: shape for name, shape in found.items() if name not in shapes}
    prefix = decoder_layers(model)[0]
    fits = all(
        name.startswith(f"{prefix}.")
        and name.endswith(".bias")
        and isinstance(other.get_submodule(name.removesuffix(".bias")), nn.Linear)
        for name in added
    )
    return added if fits and {name: found.get(name) for name in shapes} == shapes else {}
