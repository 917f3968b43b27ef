"""Verification of a loaded model: its layers, called one by one, are the model; how its matrices are used.

No architecture is trusted: before anything is written, a run sees that layers called one by one with their recorded
arguments do what the model does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.data.packing import PADDING
from lit_recon.model.decoder import Decoder, call_layer
from lit_recon.model.head import Head
from lit_recon.model.layerwise import final_states, float32_on
from lit_recon.model.matrices import LayerMatrices, find_matrices
from lit_recon.model.products import learn_input_dims
from lit_recon.system.device import Compute

LENGTH = 64  # tokens that the model is tried on
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.2}  # of the logits, relative to the largest


@torch.no_grad()
def verify(model: PreTrainedModel, tokens_ST: Tensor, *, lengths: Mapping[str, int] | None = None) -> LayerMatrices:
    """The matrices of a model, used as one pass shows, once it is known that its layers can be replayed.

    Args:
        model: The model on the CPU.
        tokens_ST: Samples, of which the one with the most text is used.
        lengths: Tokens of the samples that it will be given, by the name of the setting.

    Raises:
        ValueError: Replaying gives other logits: a layer depends on more than its own arguments; or the model cannot be
            given samples of such a length.
    """
    fullest = int((tokens_ST != PADDING).sum(1).argmax())
    tokens_BT = tokens_ST[fullest : fullest + 1, :LENGTH]
    tokens_BT = tokens_BT[:, tokens_BT[0] != PADDING]
    outputs: list[Tensor] = []
    cpu = Compute(torch.device("cpu"), "32-true")
    decoder = Decoder(model, cpu.device)
    matrices = learn_input_dims(
        find_matrices(model), lambda: outputs.append(decoder.model(tokens_BT, use_cache=False).logits.float())
    )
    (expected_BTV,) = outputs
    hidden_BTD = final_states(decoder, tokens_BT, batch_size=1, compute=cpu)
    logits_BTV = Head(decoder)(hidden_BTD).float()
    worst = (logits_BTV - expected_BTV).abs().max() / expected_BTV.abs().max()
    if not worst <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"{type(model).__name__}: its layers, called one after the other, give other logits than the model (off by "
            f"{worst:.1%}); they depend on more than the arguments they are called with, which is not supported."
        )
    for name, length in (lengths or {}).items():
        _check_length(decoder, name, length)
    return matrices


def _check_length(decoder: Decoder, name: str, length: int) -> None:
    """Try the embeddings and the first layer, where a table of positions would end."""
    try:
        hidden_BTD, calls = decoder.embed(torch.zeros(1, length, dtype=torch.long))
        with float32_on(decoder.layers[0], decoder.device):
            call_layer(decoder.layers[0], hidden_BTD, calls[0])
    except (IndexError, RuntimeError) as error:
        positions = getattr(decoder.model.config.get_text_config(), "max_position_embeddings", None)
        why = f", as max_position_embeddings={positions} in its config.json says" if positions else ""
        raise ValueError(
            f"{name}={length}: {type(decoder.model).__name__} takes no samples of that length{why}; use shorter ones "
            f"({' '.join(str(error).split())})."
        ) from error
