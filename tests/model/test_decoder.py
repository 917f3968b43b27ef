"""What lit_recon knows of Hugging Face models holds for every layer shape."""

import pytest
import torch
from conftest import CPU, EVERY_SHAPE, LENGTHS, assert_close
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_recon.data.packing import PADDING
from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import Decoder, call_layer, decoder_layers, patched_forward
from lit_recon.model.head import Head


@pytest.mark.parametrize("batch_size", [1, 3])
def test_replaying_the_recorded_calls_equals_the_models_own_forward(
    model: PreTrainedModel, tokens_ST: torch.Tensor, batch_size: int
) -> None:
    tokens_BT = tokens_ST[:batch_size]
    expected = model(tokens_BT, use_cache=False).logits
    decoder = Decoder(model, CPU.device)
    hidden_BTD, calls = decoder.embed(tokens_BT)
    for layer, call in zip(decoder.layers, calls, strict=True):
        hidden_BTD = call_layer(layer, hidden_BTD, call)
    assert torch.equal(Head(decoder)(hidden_BTD), expected)


def test_layers_with_masks_of_their_own_are_called_with_them(tokens_ST: torch.Tensor) -> None:
    calls = Decoder(tiny_model("gemma2"), CPU.device).calls(tokens_ST[:1])
    masks = [call.kwargs["attention_mask"] for call in calls]
    assert any(
        (first is None) != (second is None) or (first is not None and not torch.equal(first, second))
        for first, second in zip(masks, masks[1:], strict=False)
    ), "the tiny sliding window is shorter than the sample, so neighbouring layers must see different masks"


def test_recording_leaves_no_trace_on_the_model(model: PreTrainedModel, tokens_ST: torch.Tensor) -> None:
    layers = decoder_layers(model)[1]
    own = lambda *_, **__: None  # noqa: E731
    layers[1].own = own
    before = [set(vars(layer)) for layer in layers]
    decoder = Decoder(model, CPU.device)
    Head(decoder)(decoder.embed(tokens_ST)[0])
    assert [set(vars(layer)) for layer in layers] == before


def test_an_instance_level_forward_is_put_back_also_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    layer.forward = original = lambda inputs: inputs
    with pytest.raises(RuntimeError, match="boom"), patched_forward(layer, lambda inputs: inputs + 1):
        assert layer(1) == 2
        raise RuntimeError("boom")
    assert layer.forward is original


def test_changing_a_token_changes_nothing_before_it(model: PreTrainedModel, tokens_ST: torch.Tensor) -> None:
    changed_ST = tokens_ST.clone()
    changed_ST[:, 10] = (changed_ST[:, 10] + 1) % 64
    outputs = []
    for tokens in (tokens_ST, changed_ST):
        decoder = Decoder(model, CPU.device)
        hidden_BTD, calls = decoder.embed(tokens)
        for layer, call in zip(decoder.layers, calls, strict=True):
            hidden_BTD = call_layer(layer, hidden_BTD, call)
        outputs.append(hidden_BTD)
    assert torch.equal(outputs[0][:, :10], outputs[1][:, :10])
    assert not torch.equal(outputs[0][:, 10:], outputs[1][:, 10:])


def test_a_model_without_a_list_of_its_layers_is_refused_with_the_lists_found() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=r"7 decoder layers.*model\.layers \(3 entries\)"):
        decoder_layers(model)


@torch.no_grad()
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_replay_with_padding_equals_the_model_with_an_attention_mask(shape: str, padded_ST: Tensor) -> None:
    model = tiny_model(shape)
    decoder = Decoder(model, CPU.device)
    tokens_BT = padded_ST[:3]
    text_BT = tokens_BT != PADDING
    hidden_BTD, calls = decoder.embed(tokens_BT)
    assert torch.equal(decoder.embed(tokens_BT)[0], hidden_BTD)
    for layer, call in zip(decoder.layers, calls, strict=True):
        hidden_BTD = call_layer(layer, hidden_BTD, call)
    ids_BT = tokens_BT.masked_fill(~text_BT, 0)
    expected_BTV = model(ids_BT, attention_mask=text_BT.long(), use_cache=False).logits
    logits_BTV = Head(decoder)(hidden_BTD)
    assert torch.equal(logits_BTV[text_BT], expected_BTV[text_BT])
    for row in range(3):
        alone_BTV = model(tokens_BT[row : row + 1, : LENGTHS[row]], use_cache=False).logits
        assert_close(logits_BTV[row : row + 1, : LENGTHS[row]], alone_BTV, "a sample without its padding")


def test_calls_of_padded_samples_are_those_of_their_own_tokens(padded_ST: Tensor) -> None:
    model = tiny_model("llama")
    decoder = Decoder(model, CPU.device)
    full_ST = padded_ST.where(padded_ST != PADDING, 5)
    for tokens_BT in (full_ST[1:3], padded_ST[1:3], padded_ST[[4, 2]], full_ST[1:3]):
        kept, fresh = decoder.calls(tokens_BT), decoder.embed(tokens_BT)[1]
        for one, other in zip(kept, fresh, strict=True):
            masks = one.kwargs["attention_mask"], other.kwargs["attention_mask"]
            assert masks == (None, None) if None in masks else torch.equal(*masks)
