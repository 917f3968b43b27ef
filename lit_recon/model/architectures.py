"""python -m lit_recon.model.architectures: which architectures work, found out on tiny random models of their shapes.

Nothing here steers the code: it is the list of shapes that lit_recon is tried on, and the trial. A model of another
architecture is tried by its own run, which refuses what does not fit before it writes anything.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lit_recon.model.decoder import Decoder, LayerCall
from lit_recon.model.head import Head
from lit_recon.model.matrices import LayerMatrices, routers
from lit_recon.model.partition import Partition, layer_windows
from lit_recon.model.products import Product, observing_products
from lit_recon.model.verify import verify
from lit_recon.model.windows import HalfWindow, MatrixWindow, WindowKind
from lit_recon.system.console import Console
from lit_recon.system.terminal import Parser, say

VOCABULARY = 64
COLUMNS = ("architecture", "halves", *map(str, WindowKind), "covered", "remarks")
TESTED = "Tested with transformers "
COMPOSED = 1e-5  # largest difference between a model and its windows, relative to the largest output

_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_COMMON |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GATED = _COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_HEADS = {"head_dim": 8}
_SLIDING = {"sliding_window": 8}
_MIXED = _SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}  # in turn
_LINEAR: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
_LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
_LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_GEMMA4 = _GATED | _HEADS | _MIXED | {"vocab_size_per_layer_input": VOCABULARY}
_LOW_RANK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}


@dataclass(frozen=True)
class Shape:
    """One layer shape: how to configure a tiny model of it.

    Attributes:
        title: For people.
        model_type: transformers' name.
        settings: Of its configuration.
    """

    title: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)


_SHAPES = {
    "llama": Shape("Llama", "llama", _GATED),
    "mistral": Shape("Mistral", "mistral", _GATED | _SLIDING),
    "qwen2": Shape("Qwen2", "qwen2", _GATED),
    "qwen3": Shape("Qwen3", "qwen3", _GATED | _HEADS),
    "gemma2": Shape("Gemma 2", "gemma2", _GATED | _HEADS | _SLIDING),
    "gemma3": Shape("Gemma 3 (text)", "gemma3_text", _GATED | _HEADS | _MIXED),
    "phi": Shape("Phi", "phi", _GATED),
    "phi3": Shape("Phi-3", "phi3", _GATED),
    "opt": Shape("OPT", "opt", _COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt_post_norm": Shape(
        "OPT, norms after the residual, with projections",
        "opt",
        _COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "gpt2": Shape("GPT-2", "gpt2", _GPT2),
    "gpt_neox": Shape("GPT-NeoX", "gpt_neox", _COMMON | {"intermediate_size": 48}),
    "gptj": Shape("GPT-J", "gptj", _GPT2 | {"rotary_dim": 4}),
    "falcon": Shape("Falcon", "falcon", _COMMON),
    "cohere2": Shape("Cohere 2", "cohere2", _GATED | _MIXED),
    "olmo2": Shape("OLMo 2", "olmo2", _GATED),
    "stablelm": Shape("StableLM", "stablelm", _GATED),
    "starcoder2": Shape("StarCoder 2", "starcoder2", _GATED | _SLIDING),
    "glm4": Shape("GLM-4", "glm4", _GATED | _HEADS),
    "granite": Shape("Granite", "granite", _GATED | {"residual_multiplier": 0.5}),
    "smollm3": Shape("SmolLM3", "smollm3", _GATED),
    "bloom": Shape("BLOOM", "bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "mixtral": Shape("Mixtral", "mixtral", _GATED | _EXPERTS | _SLIDING),
    "qwen3_moe": Shape(
        "Qwen3-MoE",
        "qwen3_moe",
        _GATED | _HEADS | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": Shape("gpt-oss", "gpt_oss", _GATED | _HEADS | _EXPERTS | _SLIDING),
    "deepseek_v3": Shape(
        "DeepSeek V3",
        "deepseek_v3",
        _GATED
        | _LOW_RANK
        | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "llama4": Shape(
        "Llama 4 (text)",
        "llama4_text",
        _GATED
        | _HEADS
        | {"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1}
        | {"interleave_moe_layer_step": 2, "attention_chunk_size": 8},
    ),
    "gemma4": Shape("Gemma 4 (text)", "gemma4_text", _GEMMA4 | {"hidden_size_per_layer_input": 8}),
    "gemma4_moe": Shape(
        "Gemma 4 (text), mixture of experts",
        "gemma4_text",
        _GEMMA4
        | {"hidden_size_per_layer_input": 0, "enable_moe_block": True}
        | {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    ),
    "qwen3_next": Shape(
        "Qwen3-Next",
        "qwen3_next",
        _GATED
        | _HEADS
        | _LINEAR
        | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
        | {"shared_expert_intermediate_size": 24},
    ),
    "qwen3_5": Shape("Qwen3.5 (text)", "qwen3_5_text", _GATED | _HEADS | _LINEAR),
    "lfm2": Shape("LFM2", "lfm2", _GATED | {"layer_types": ["conv", "full_attention"]}),
    "falcon_h1": Shape("Falcon-H1", "falcon_h1", _GATED | _HEADS | _MAMBA | {"mamba_d_ssm": 64}),
    "granitemoehybrid": Shape(
        "Granite 4, hybrid",
        "granitemoehybrid",
        _GATED | _EXPERTS | _MAMBA | {"shared_intermediate_size": 24, "layer_types": ["mamba", "attention"]},
    ),
    "modernbert": Shape("ModernBERT decoder", "modernbert-decoder", _COMMON | _MIXED | {"intermediate_size": 48}),
    "cohere": Shape("Cohere, norms per head", "cohere", _GATED | {"use_qk_norm": True}),
    "olmo3": Shape("OLMo 3", "olmo3", _GATED | _MIXED),
    "exaone4": Shape("EXAONE 4", "exaone4", _GATED | _HEADS | _MIXED),
    "seed_oss": Shape("Seed-OSS", "seed_oss", _GATED | _HEADS),
    "hunyuan": Shape("Hunyuan", "hunyuan_v1_dense", _GATED | _HEADS),
    "nemotron": Shape("Nemotron", "nemotron", _GATED | _HEADS),
    "apertus": Shape("Apertus", "apertus", _GATED),
    "mpt": Shape(
        "MPT", "mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}
    ),
    "minimax": Shape(
        "MiniMax", "minimax", _GATED | _EXPERTS | _HEADS | {"layer_types": ["linear_attention", "full_attention"]}
    ),
    "olmoe": Shape("OLMoE", "olmoe", _GATED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": Shape("Phi-3.5-MoE", "phimoe", _GATED | _EXPERTS),
    "granitemoe": Shape("Granite MoE", "granitemoe", _GATED | _EXPERTS),
    "glm4_moe": Shape(
        "GLM-4.5",
        "glm4_moe",
        _GATED
        | _HEADS
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
        | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "ernie4_5_moe": Shape(
        "ERNIE 4.5",
        "ernie4_5_moe",
        _GATED | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    ),
}


SHAPES = {name: shape for name, shape in _SHAPES.items() if shape.model_type in CONFIG_MAPPING}  # what is installed
UNKNOWN = _SHAPES.keys() - SHAPES.keys()


def tiny_model(name: str, **changes: Any) -> PreTrainedModel:
    """A random model of a shape: weights large enough that its layers matter, and norms that are not the identity."""
    shape = SHAPES[name]
    settings = shape.settings | changes
    if kinds := settings.get("layer_types"):
        settings["layer_types"] = [kinds[index % 2] for index in range(settings["num_hidden_layers"])]
    config = AutoConfig.for_model(shape.model_type, **settings)
    attention = {"attn_implementation": changes["attn_implementation"]} if "attn_implementation" in changes else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, **attention)
        large_weights(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def large_weights(model: PreTrainedModel) -> None:
    """Draw weights of a tiny model so that its layers matter, and norms that are not the identity."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 0.2)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


@torch.no_grad()
def compose(model: PreTrainedModel, tokens_BT: Tensor, **settings: Any) -> Tensor:
    """The model's logits, (B, T, V), computed window by window as a partition into layers or halves cuts it."""
    decoder = Decoder(model, torch.device("cpu"))
    hidden_BTD, calls = decoder.embed(tokens_BT)
    added_BTD: Tensor | None = None
    for window in layer_windows(model, **settings):
        outputs_BTD = window(hidden_BTD, calls, slice(0, window.num_kept))
        if window.parallel_half == "first":
            added_BTD = outputs_BTD - hidden_BTD
        else:
            hidden_BTD = outputs_BTD if window.parallel_half is None or added_BTD is None else outputs_BTD + added_BTD
    return Head(decoder)(hidden_BTD)


@torch.no_grad()
def multiply(model: PreTrainedModel, matrices: LayerMatrices, tokens_BT: Tensor) -> float:
    """How far the products of matrix windows are from those that the model makes, relative to the largest of each."""
    cut = Partition(by=WindowKind.MATRIX).cut(model, matrices)
    windows = [window for window in cut if isinstance(window, MatrixWindow)]
    by_name = {window.matrix.name: window for window in windows}
    worst = [0.0]

    def compare(product: Product) -> None:
        rows_NI, weight = product.rows_NI, product.matrix.weight
        if not len(rows_NI):
            return
        used = weight[product.expert] if weight.dim() == 3 else weight
        expected_NO = torch.tensordot(rows_NI, used, ([1], [product.input_dim]))
        experts_BT = torch.full((1, len(rows_NI)), product.expert)
        calls = [LayerCall(kwargs={"experts": experts_BT})] if product.matrix.experts > 1 else []
        apart_NO = by_name[product.matrix.name](rows_NI[None], calls)[0] - expected_NO
        worst.append((apart_NO.abs().max() / expected_NO.abs().max().clamp(min=1e-30)).item())

    with observing_products([window.matrix for window in windows], compare):
        model(tokens_BT, use_cache=False)
    return max(worst)


def support(name: str) -> dict[str, str]:
    """What works on a tiny model of a shape, by column of the table."""
    model = tiny_model(name)
    tokens_BT = torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
    matrices = verify(model, tokens_BT)
    expected_BTV = model(tokens_BT, use_cache=False).logits
    row, remarks = dict.fromkeys(COLUMNS, ""), []
    layers = layer_windows(model, matrices)
    found = [matrix for layer in layers for matrix in layer.matrices()]
    row["matrix"] = "yes" if all(matrix.input_dim is not None for matrix in found) else "in part"
    worst = multiply(model, matrices, tokens_BT)
    row["matrix"] = row["matrix"] if worst <= COMPOSED else f"no: off by {worst:.0e}"
    for kind in list(WindowKind)[1:]:
        try:
            logits_BTV = compose(model, tokens_BT, by=kind, size=2 if kind == WindowKind.BLOCKS else 1)
            worst = (logits_BTV - expected_BTV).abs().max() / expected_BTV.abs().max()
            row[str(kind)] = "yes" if worst <= COMPOSED else f"no: off by {worst:.0e}"
        except ValueError as error:
            row[str(kind)] = "refused"
            remarks.append(str(error).partition(";")[0])
    halves = layer_windows(model, by="half") if row["half"] == "yes" else []
    if halves:
        row["halves"] = "sequential" if halves[0].parallel_half is None else "parallel"
    shared = sorted({name for half in halves if isinstance(half, HalfWindow) for name in half.split.shared})
    if shared:
        remarks.append(f"{', '.join(shared)}: of both halves, trained in the attention half")
    covered = sum(matrix.weight.numel() for matrix in found if matrix.input_dim is not None)
    row["covered"] = f"{covered / sum(p.numel() for layer in layers for p in layer.parameters()):.1%}"
    if any(routers(layer) for layer in layers):
        remarks.append("routers stay dense")
    return row | {"architecture": SHAPES[name].title, "remarks": "; ".join(remarks)}


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """The table for a README, and what it was made with."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row[column] for column in COLUMNS) + " |" for row in rows]
    return "\n".join([*lines, "", f"{TESTED}{transformers.__version__}."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the support table; the exit status is 1 if a shape computes something else than its model."""
    parser = Parser(
        prog="python -m lit_recon.model.architectures",
        description="Try lit_recon on tiny random models of decoder architectures and print what works.",
    )
    parser.add_argument("--markdown", action="store_true", help="print a GitHub Markdown table")
    chosen = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    rows = [support(name) for name in SHAPES]
    if chosen.markdown:
        say(f"{markdown(rows)}\n")
    else:
        table = Table(
            *COLUMNS, title=f"transformers {transformers.__version__}; covered: share of the layers' parameters"
        )
        for row in rows:
            table.add_row(*(row[column] for column in COLUMNS))
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    return int(any(value.startswith("no") for row in rows for value in row.values()))


if __name__ == "__main__":
    sys.exit(main())
