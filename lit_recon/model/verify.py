"""Verification of a loaded model: its layers, called one by one, are the model; how its matrices are used.

No architecture is trusted: before anything is written, a run sees on a few tokens

    that the model can be run, and that its logits are finite
    that layers called one after the other with their recorded arguments do what the model does
    that a token changes nothing before it: only a causal model predicts

Layers are compared in float32, one of them at a time: what the model itself makes in 16 bits would hide a wrong mask.
What a model's own code raises while it is examined is a refusal with the cause.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from lit_recon.data.packing import PADDING
from lit_recon.model.decoder import Decoder, call_layer, cause, examining, first_tensor, patched_forward
from lit_recon.model.head import Head
from lit_recon.model.layerwise import final_states, float32_on
from lit_recon.model.matrices import LayerMatrices, find_matrices
from lit_recon.model.products import learn_input_dims
from lit_recon.system.device import Compute

LENGTH = 64  # tokens that the model is tried on
STATES = 1e-4  # tolerance of hidden states, which are in float32, relative to each token's
LOGITS = {torch.float16: 0.01, torch.bfloat16: 0.01}  # of logits, relative to the largest, of a head in 16 bits
LEAK = 1e-3  # how far a token may change those before it: experts are given other rows then, and round otherwise
REPLAYED = (
    "its layers cannot be called one after the other, as reconstruction does; layers that hand each other more than "
    "hidden states, such as keys and values, are not supported"
)


@torch.no_grad()
def verify(model: PreTrainedModel, tokens_ST: Tensor, *, lengths: Mapping[str, int] | None = None) -> LayerMatrices:
    """The matrices of a model, used as one pass shows, once it is known that its layers can be replayed.

    Args:
        model: The model on the CPU.
        tokens_ST: Samples, of which the one with the most text is used.
        lengths: Tokens of the samples that it will be given, by the name of the setting.

    Raises:
        ValueError: It cannot be run, its logits are not finite, replaying gives others (a layer depends on more than
            its own arguments), it is not causal, or it cannot be given samples of such a length.
    """
    fullest = int((tokens_ST != PADDING).sum(1).argmax())
    tokens_BT = tokens_ST[fullest : fullest + 1, :LENGTH]
    tokens_BT = tokens_BT[:, tokens_BT[0] != PADDING]
    outputs: list[Tensor] = []
    decoder, found = Decoder(model, torch.device("cpu")), find_matrices(model)
    run = lambda: outputs.append(decoder.model(tokens_BT, use_cache=False).logits)  # noqa: E731
    with examining(model, f"it cannot be run on {tokens_BT.shape[1]} tokens of the text in {_dtype_name(model)}"):
        matrices = learn_input_dims(found, run)
    _check_finite(model, outputs[0])
    with examining(model, REPLAYED):
        # Of the same shape and next to each other: what layers hand on besides hidden states would be the other's.
        states_2TD = _replayed(decoder, torch.cat([tokens_BT, _changed(tokens_BT, 1)]))
        replayed_BTV = Head(decoder)(states_2TD[:1])
        expected_BTD, expected_BTV = _own_pass(decoder, tokens_BT)
    logits_apart_BTV = (replayed_BTV - expected_BTV).abs() / expected_BTV.abs().max().clamp(min=1e-30)
    _check_replayed(model, _apart(states_2TD[:1], expected_BTD), logits_apart_BTV)
    _check_causal(decoder, tokens_BT, states_2TD)
    for name, length in (lengths or {}).items():
        _check_length(decoder, name, length)
    return matrices


def _replayed(decoder: Decoder, tokens_ST: Tensor) -> Tensor:
    """Hidden states after the last layer, (S, T, D), of layers called one after the other."""
    return final_states(decoder, tokens_ST, batch_size=1, compute=Compute(torch.device("cpu"), "32-true"))


def _own_pass(decoder: Decoder, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states after the last layer (B, T, D) and logits (B, T, V) of the model itself, its layers in float32."""
    final: list[Tensor] = []
    with ExitStack() as stack:
        for index, layer in enumerate(decoder.layers):
            is_last = index == len(decoder.layers) - 1
            stack.enter_context(_in_float32(layer, decoder.device, final if is_last else None, decoder.model.dtype))
        logits_BTV = decoder.model(tokens_BT, use_cache=False).logits
    return final[0], logits_BTV


@contextmanager
def _in_float32(
    layer: nn.Module, device: torch.device, final: list[Tensor] | None, dtype: torch.dtype
) -> Iterator[None]:
    """A context in which a layer computes in float32; the last one also notes its output, and gives the head its own.

    Args:
        layer: The layer.
        device: Where it is.
        final: Takes its output; None for layers that others follow.
        dtype: Of the head.
    """
    original = layer.forward

    def cast(kind: torch.dtype) -> Callable[[Any], Any]:
        return lambda leaf: leaf.to(kind) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(cast(torch.float32), (args, kwargs))
        with float32_on(layer, device):
            output = original(*args, **kwargs)
        if final is None:
            return output
        final.append(first_tensor(output))
        return tree_map(cast(dtype), output)

    with patched_forward(layer, forward):
        yield


def _check_finite(model: PreTrainedModel, logits_BTV: Tensor) -> None:
    """Refuse a model whose own logits are not finite, with the reason."""
    if logits_BTV.isfinite().all():
        return
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"{type(model).__name__}: {name} holds values that are not finite (NaN or infinity), and so do the "
                f"logits; its files are damaged, or were written in a type that was too small (model.dtype is "
                f"{_dtype_name(model)})."
            )
    way_out = "use model.dtype=bfloat16 or float32" if model.dtype == torch.float16 else "use another model"
    raise ValueError(
        f"{type(model).__name__}: its logits are not finite, though all of its weights are: it overflows in "
        f"model.dtype={_dtype_name(model)}; {way_out}."
    )


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _check_replayed(model: PreTrainedModel, apart_BT: Tensor, logits_apart_BTV: Tensor) -> None:
    """Refuse layers that give other hidden states, or lead to other logits, than in the model."""
    for worst, allowed, what in (
        (apart_BT.max(), STATES, "hidden states"),
        (logits_apart_BTV.max(), LOGITS.get(model.dtype, STATES), "logits"),
    ):
        if not worst <= allowed:
            raise ValueError(
                f"{type(model).__name__}: its layers, called one after the other, give other {what} than the model "
                f"(off by {worst:.1%}); they depend on more than the arguments that they are called with, such as keys "
                "and values of other layers, which is not supported."
            )


def _check_causal(decoder: Decoder, tokens_BT: Tensor, states_2TD: Tensor) -> None:
    """Refuse a model in which the last token changes hidden states before it.

    Args:
        decoder: The model.
        tokens_BT: One sample.
        states_2TD: Its last hidden states, and those of the sample with another last token.
    """
    if tokens_BT.shape[1] == 1:
        return
    other_BTD = states_2TD[1:]
    for step in (2, 3, 0):  # seen thrice: a router that is undecided may choose other experts once
        leak = _apart(other_BTD[:, :-1], states_2TD[:1, :-1]).max()
        if leak <= LEAK:
            return
        if step:
            with examining(decoder.model, REPLAYED):
                other_BTD = _replayed(decoder, _changed(tokens_BT, step))
    raise ValueError(
        f"{type(decoder.model).__name__}: another last token changes what it makes of the tokens before it (by "
        f"{leak:.1%}): it is not a causal language model, as encoders such as BERT are not, and perplexity means "
        "nothing for it."
    )


def _changed(tokens_BT: Tensor, step: int) -> Tensor:
    """A sample with another last token, of those that it holds where it holds others."""
    changed_BT = tokens_BT.clone()
    last = changed_BT[0, -1]
    others = tokens_BT[tokens_BT != last].unique()
    changed_BT[0, -1] = others[step % len(others)] if len(others) else (last == 0).long()
    return changed_BT


def _apart(states_BTD: Tensor, expected_BTD: Tensor) -> Tensor:
    """How far each token's hidden states are from others, (B, T), relative to these."""
    return (states_BTD - expected_BTD).norm(dim=-1) / expected_BTD.norm(dim=-1).clamp(min=1e-30)


def _check_length(decoder: Decoder, name: str, length: int) -> None:
    """Try the embeddings and the first layer, where a table of positions would end."""
    try:
        hidden_BTD, calls = decoder.embed(torch.zeros(1, length, dtype=torch.long))
        with float32_on(decoder.layers[0], decoder.device):
            call_layer(decoder.layers[0], hidden_BTD, calls[0])
    except Exception as error:
        positions = getattr(decoder.model.config.get_text_config(), "max_position_embeddings", None)
        why = f", as max_position_embeddings={positions} in its config.json says" if positions else ""
        raise ValueError(
            f"{name}={length}: {type(decoder.model).__name__} takes no samples of that length{why}; use shorter ones "
            f"({cause(error)})."
        ) from error
