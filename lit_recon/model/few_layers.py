"""A random model of a model's own class with few layers: to rehearse a run on, or to time a layer of real size."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedModel


def few_layers(model: PreTrainedModel, settings: Mapping[str, Any], *, depth: int = 2) -> PreTrainedModel:
    """A random float32 model of a model's class, on the CPU.

    Args:
        model: Its class and configuration are used; its weights are not, and may be on the meta device.
        settings: Of its configuration, such as widths; those that it does not have are left out.
        depth: Layers, where it has as many.
    """
    config = deepcopy(model.config)
    text = config.get_text_config()
    depth = min(depth, text.num_hidden_layers)
    for name, value in {**settings, "num_hidden_layers": depth}.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    made = type(model)._from_config(config, dtype=torch.float32)
    return made.requires_grad_(False).eval()
