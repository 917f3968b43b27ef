"""Tiny random models that also see, in the shapes of public ones: their text decoder is a part of them."""

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from lit_recon.model.architectures import large_weights

_TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
_TEXT |= {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_VISION |= {"num_hidden_layers": 3}  # as many as the text has
_QWEN_VISION = {"hidden_size": 16, "depth": 3, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32}
_QWEN = {"image_token_id": 62, "video_token_id": 61, "vision_start_token_id": 60, "vision_end_token_id": 59}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}

MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _TEXT | {"model_type": "gemma3_text", "sliding_window": 8},
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "boi_token_index": 60,
        "eoi_token_index": 61,
        "image_token_index": 62,
    },
    "qwen3_5": {
        "text_config": _TEXT
        | _LINEAR
        | {"model_type": "qwen3_5_text", "num_hidden_layers": 4}
        | {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
        "vision_config": _QWEN_VISION | {"num_position_embeddings": 16},
    }
    | _QWEN,
    "llama4": {
        "text_config": _TEXT
        | _EXPERTS
        | {"model_type": "llama4_text", "intermediate_size_mlp": 48, "attention_chunk_size": 8},
        "vision_config": _VISION
        | {"model_type": "llama4_vision_model", "intermediate_size": 64, "vision_output_dim": 32}
        | {"projector_input_dim": 32, "projector_output_dim": 32},
        "image_token_index": 62,
        "boi_token_index": 60,
        "eoi_token_index": 61,
    },
    "smolvlm": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "smolvlm_vision"},
        "image_token_id": 62,
        "scale_factor": 2,
    },
    "qwen2_5_vl": {
        "text_config": _TEXT
        | {"model_type": "qwen2_5_vl_text", "rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}},
        "vision_config": _QWEN_VISION,
    }
    | _QWEN,
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral"},
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": 62,
    },
}

OLDEST = {"qwen3_5": "5.20", "llama4": "5.20"}  # of transformers, that has it and can make it


def tiny_multimodal(kind: str) -> PreTrainedModel:
    """A random model of a kind, with weights large enough that its layers matter."""
    if Version(transformers.__version__) < Version(OLDEST.get(kind, "5.0")):
        pytest.skip(f"transformers {transformers.__version__} cannot make it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **MULTIMODAL[kind]))
        large_weights(model)
    return model.eval()
