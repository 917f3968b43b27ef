"""What a model cannot take is found before a run begins; that replayed layers are the model is in test_partition.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, letter_tokenizer
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.mllama.modeling_mllama import MllamaForCausalLM, MllamaTextConfig

from lit_recon.data.packing import PADDING
from lit_recon.model import verify as module
from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import LayerCall, _same
from lit_recon.model.verify import verify

POSITIONS = 64  # of the tiny models
TOKENS_ST = torch.randint(3, 64, (1, 16), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"pad_token_id": 0, "max_position_embeddings": 64}
KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
PER_LAYER = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
LOW_RANK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "BERT": ("bert", SIZES, "another last token changes .* not a causal language model"),
    "GLM-5": (
        "glm_moe_dsa",
        SIZES | EXPERTS | LOW_RANK | {"index_topk": 128, "index_head_dim": 8, "index_n_heads": 2},
        "layer 1 is given more than hidden states by an earlier layer",
    ),
    "Gemma 4, shared keys and values": (
        "gemma4_text",
        GROUPED | KINDS | PER_LAYER | {"num_kv_shared_layers": 2},
        "layers that hand each other more than hidden states, such as keys and values, are not supported: KeyError",
    ),
    "Gemma 3n": (
        "gemma3n_text",
        GROUPED
        | KINDS
        | {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.5] * 4, "num_kv_shared_layers": 0}
        | PER_LAYER
        | {"laurel_rank": 4, "altup_num_inputs": 2},
        r"hidden states of shape \(2, 1, 16, 32\) for \(1, 16\) tokens",
    ),
    "XLNet": ("xlnet", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, "of shape"),
}


def random_model(kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    """A random model of any architecture."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers does not know {kind}")
    return randomised(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)))


@torch.no_grad()
def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """A model with weights large enough that its layers matter."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 0.2)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("shape", ["gpt2", "opt", "gptj"])  # tables of positions, beside and inside the layers
def test_samples_longer_than_a_table_of_positions_are_refused_with_both_numbers(shape: str) -> None:
    model = tiny_model(shape)
    verify(model, TOKENS_ST, lengths={"data.length": POSITIONS})
    said = f"data.evaluation_length={POSITIONS + 1}: .* max_position_embeddings={POSITIONS} "
    with pytest.raises(ValueError, match=said):
        verify(model, TOKENS_ST, lengths={"data.length": POSITIONS, "data.evaluation_length": POSITIONS + 1})


@pytest.mark.parametrize("shape", ["llama", "bloom"])
def test_models_without_such_a_table_take_longer_ones(shape: str) -> None:
    verify(tiny_model(shape), TOKENS_ST, lengths={"data.length": 2 * POSITIONS})


def test_the_sample_with_the_most_text_is_tried() -> None:
    tokens_ST = TOKENS_ST.repeat(3, 1)
    tokens_ST[0, 2:] = tokens_ST[1, 9:] = PADDING
    model, shapes = tiny_model("llama"), []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    verify(model, tokens_ST)
    assert shapes and set(shapes) == {(1, 16)}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_model_that_cannot_be_replayed_or_does_not_predict_is_refused_with_the_reason(name: str) -> None:
    kind, settings, said = UNSUPPORTED[name]
    model = random_model(kind, settings)
    with pytest.raises(ValueError, match=said):
        verify(model, TOKENS_ST)
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_that_a_pass_over_text_leaves_out_are_named() -> None:
    config = MllamaTextConfig(**SIZES | {"num_key_value_heads": 2, "cross_attention_layers": [1]})
    with pytest.raises(ValueError, match="makes 3 calls of its 4 layers, without layers 1; expected each once"):
        verify(randomised(MllamaForCausalLM(config)), TOKENS_ST)


@pytest.mark.parametrize("name", ["BERT", "Gemma 4, shared keys and values"])
def test_such_a_model_ends_a_run_with_status_2_and_no_file(
    tiny_run: Callable[..., Ended], tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    folder, (kind, settings, _) = tmp_path_factory.mktemp("model"), UNSUPPORTED[name]
    random_model(kind, settings).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    ended = tiny_run(f"model.name={folder}")
    assert ended.status == 2 and "Traceback" not in ended.err and list(Path().iterdir()) == [], ended


class Lookup:
    """A layer that keeps what it was given for the next one, as a cache would."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.kept: list[Tensor] = []
        first, last = model.model.layers[0], model.model.layers[-1]
        forwards = first.forward, last.forward

        def keep(hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.kept[:] = [hidden_BTD]
            return forwards[0](hidden_BTD, *args, **kwargs)

        first.forward = keep
        last.forward = lambda hidden_BTD, *args, **kwargs: forwards[1](hidden_BTD + self.kept[0], *args, **kwargs)


def test_a_state_that_layers_hand_on_behind_the_chains_back_is_noticed() -> None:
    model = tiny_model("llama")
    Lookup(model)
    with pytest.raises(ValueError, match="give other hidden states than the model .* depend on more than"):
        verify(model, TOKENS_ST)


def test_a_wrong_mask_is_noticed_in_16_bits_as_in_32(monkeypatch: pytest.MonkeyPatch) -> None:
    # The last layer sees one token more than its recorded arguments say; in bfloat16 logits that is within rounding.
    def replayed(decoder: Any, tokens_ST: Tensor) -> Tensor:
        states_STD = original(decoder, tokens_ST)
        states_STD[:, -1] *= 1.002
        return states_STD

    original = module._replayed
    monkeypatch.setattr(module, "_replayed", replayed)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=r"other hidden states than the model \(off by 0.2%\)"):
            verify(tiny_model("llama").to(dtype), TOKENS_ST)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["llama", "gemma2"])
def test_models_of_other_types_are_compared_in_float32_and_stay_as_they_are(shape: str, dtype: torch.dtype) -> None:
    model = tiny_model(shape).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    verify(model, TOKENS_ST)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_said_to_be_with_the_name_of_the_first(value: float) -> None:
    model = tiny_model("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 2] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        verify(model, TOKENS_ST)


def test_an_overflow_in_float16_names_the_setting_and_a_way_out() -> None:
    model = tiny_model("llama").to(torch.float16)
    model.get_parameter("model.layers.1.mlp.up_proj.weight").fill_(60000)
    with pytest.raises(ValueError, match="overflows in model.dtype=float16; use model.dtype=bfloat16 or float32"):
        verify(model, TOKENS_ST)


def test_what_a_models_code_raises_is_the_cause_of_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("sliding_attention")

    monkeypatch.setattr(type(model.model.layers[0]), "forward", fail)
    with pytest.raises(
        ValueError, match="cannot be run on 16 tokens of the text in float32: KeyError: 'sliding_attention'"
    ):
        verify(model, TOKENS_ST)


class Opaque:
    """An argument that cannot be compared."""


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (5, 5, True),
        (5, 9, False),  # a number that is made from the tokens
        (True, 1, False),
        ("causal", "causal", True),
        ("causal", "full", False),
        (None, None, True),
        (Opaque(), Opaque(), True),
        ((1, 2), (1, 2, 3), False),
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.zeros(2), False),
        (torch.ones(2), None, False),
    ],
)
def test_arguments_of_layers_are_compared_by_value(one: object, other: object, equal: bool) -> None:
    calls = [[LayerCall(kwargs={"given": given})] for given in (one, other)]
    assert _same(*calls) is equal


def test_a_leak_must_be_seen_for_three_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    # As of a router that is undecided between two experts, which chooses another one once.
    original, calls = module._replayed, []

    def replayed(decoder: Any, tokens_ST: Tensor) -> Tensor:
        calls.append(tokens_ST)
        states_STD = original(decoder, tokens_ST)
        if len(calls) <= leaking:
            states_STD[-1, 3] += 1
        return states_STD

    monkeypatch.setattr(module, "_replayed", replayed)
    leaking = 2
    verify(tiny_model("llama"), TOKENS_ST)
    assert len(calls) == 3 and len({int(tokens_ST[-1, -1]) for tokens_ST in calls} - {int(TOKENS_ST[0, -1])}) == 3
    leaking = 3
    calls.clear()
    with pytest.raises(ValueError, match="not a causal language model"):
        verify(tiny_model("llama"), TOKENS_ST)
    assert len(calls) == 3
