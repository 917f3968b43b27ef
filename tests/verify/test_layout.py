"""Where matrices lie in the files of a folder: for every shape of model that lit_recon is tried on, and other savings.

A model is made 2:4 in memory by its own matrices. However it is stored, all of that must be found in its files.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import EVERY_SHAPE, model_of
from safetensors.torch import load_file
from tiny_folders import change, prune, pruned_folder, read, save, save_masks, two_of_four
from transformers import GPT2Model

from lit_recon.model.architectures import tiny_model
from lit_recon.model.matrices import find_matrices
from lit_recon.verify.findings import Findings, examine
from lit_recon.verify.request import Request

sys.path.append(str(Path(__file__).parents[1] / "model"))
from multimodal import MULTIMODAL, tiny_multimodal


def examined(folder: Path, masks: Path | None = None, pattern: tuple[int, int] | None = (2, 4)) -> Findings:
    return examine(Request(folder=folder, masks=masks, pattern=pattern))


def holding(findings: Findings) -> list[str]:
    return [verdict.asked for verdict in findings.verdicts() if verdict.holds]


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_masks_and_pattern_of_a_model_in_memory_are_found_in_its_files(shape: str, tmp_path: Path) -> None:
    folder, masks = pruned_folder(tmp_path / "model", shape)
    findings = examined(folder, masks)
    assert holding(findings) == ["masks", "pattern"], (findings.lacking, findings.misfits, findings.verdicts())
    weights = {name: mask for name, mask in prune(tiny_model(shape)).items()}
    assert sum(found.zeros.weights for found in findings.matrices) == sum(mask.numel() for mask in weights.values())
    assert sum(found.zeros.masked or 0 for found in findings.matrices) == sum(
        int((~mask).sum()) for mask in weights.values()
    )
    content = load_file(folder / "model.safetensors")
    assert {found.part.name for found in findings.matrices} <= content.keys()
    zeros = sum(int((tensor == 0).sum()) for tensor in content.values())
    assert findings.total_sparsity == pytest.approx(zeros / sum(tensor.numel() for tensor in content.values()))
    assert findings.remarks == []


def test_matrices_of_gpt2_are_looked_at_along_their_first_dimension(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    for matrix in (matrix for layer in find_matrices(model) for matrix in layer):
        matrix.weight.data.mul_(two_of_four(matrix.weight, -1))  # the wrong one
    folder = save(model, tmp_path / "model")
    findings = examined(folder)
    assert {found.part.input_dim for found in findings.matrices} == {0}
    assert [found.zeros.over for found in findings.matrices if not found.zeros.over] == []
    assert holding(findings) == []


def test_one_weight_of_one_expert_is_found_where_files_hold_experts_apart(tmp_path: Path) -> None:
    folder, masks = pruned_folder(tmp_path / "model", "mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"  # a part of mlp.experts.down_proj
    weight = read(folder, name)
    assert torch.count_nonzero(weight[:, 2]) == 0
    weight[5, 2] = 0.25
    change(folder, **{name.replace(".", "__"): weight})
    findings = examined(folder, masks)
    assert holding(findings) == []
    wrong = {found.part.name: found.zeros.masked_nonzero for found in findings.matrices if found.zeros.masked_nonzero}
    assert wrong == {name: 1}
    assert [found.part.name for found in findings.matrices if found.zeros.over] == [name]


def test_one_weight_of_stacked_experts_is_found(tmp_path: Path) -> None:
    folder, masks = pruned_folder(tmp_path / "model", "gpt_oss")
    name = "model.layers.2.mlp.experts.down_proj"  # (experts, inputs, outputs)
    weight = read(folder, name)
    assert torch.count_nonzero(weight[:, 2]) == 0
    weight[3, 2, 7] = -1
    change(folder, **{name.replace(".", "__"): weight})
    findings = examined(folder, masks)
    wrong = {found.part.name: found.zeros.masked_nonzero for found in findings.matrices if found.zeros.masked_nonzero}
    assert wrong == {name: 1}
    (broken,) = [found for found in findings.matrices if found.zeros.over]
    assert (broken.part.name, broken.part.input_dim, broken.zeros.over) == (name, 0, 1)


@pytest.mark.parametrize(("shape", "input_dim"), [("gpt_oss", 1), ("mixtral", 0)])
def test_stacked_experts_that_the_files_have_transposed_are_found(shape: str, input_dim: int, tmp_path: Path) -> None:
    model = tiny_model(shape)
    masks = save_masks(prune(model), tmp_path / "masks.safetensors")
    folder = save(model, tmp_path / "model", save_original_format=False)
    names = [name for name in load_file(folder / "model.safetensors") if name.endswith("experts.down_proj")]
    change(folder, **{name.replace(".", "__"): read(folder, name).mT.contiguous() for name in names})
    findings = examined(folder, masks)
    assert holding(findings) == ["masks", "pattern"]
    assert {found.part.input_dim for found in findings.matrices if found.part.name in names} == {input_dim}


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_text_decoder_of_a_model_that_also_sees_is_found(kind: str, tmp_path: Path) -> None:
    model = tiny_multimodal(kind)
    found = [matrix for layer in find_matrices(model) for matrix in layer if matrix.input_dim is not None]
    kept = {matrix.name: two_of_four(matrix.weight, matrix.input_dim - 2) for matrix in found}
    for matrix in found:
        matrix.weight.data.mul_(kept[matrix.name])
    folder, masks = save(model, tmp_path / "model"), save_masks(kept, tmp_path / "masks.safetensors")
    findings = examined(folder, masks)
    assert holding(findings) == ["masks", "pattern"], findings.lacking
    assert sum(found.zeros.masked or 0 for found in findings.matrices) == sum(
        int((~mask).sum()) for mask in kept.values()
    )


def test_shards_are_looked_at_as_one_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    masks = save_masks(prune(model), tmp_path / "masks.safetensors")
    folder = save(model, tmp_path / "model", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    findings = examined(folder, masks)
    assert holding(findings) == ["masks", "pattern"] and len(findings.matrices) == 21
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match="no model-00002-of-.*, which model.safetensors.index.json lists"):
        examined(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tied_embeddings_and_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True).to(dtype)
    masks = save_masks(prune(model), tmp_path / "masks.safetensors")
    folder = save(model, tmp_path / "model")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    findings = examined(folder, masks)
    assert holding(findings) == ["masks", "pattern"] and len(findings.matrices) == 21
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert findings.other_numbers + sum(found.zeros.weights for found in findings.matrices) == parameters


def test_a_model_saved_without_its_head_has_names_without_the_prefix(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    masks = save_masks(prune(model), tmp_path / "masks.safetensors")
    assert isinstance(model.transformer, GPT2Model)
    folder = save(model.transformer, tmp_path / "model")
    findings = examined(folder, masks)
    assert "h.0.attn.c_attn.weight" in {found.part.name for found in findings.matrices}
    assert holding(findings) == ["masks", "pattern"]


def config_of(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (None, "no config.json"),
        ({"model_type": "unheard_of"}, "unheard_of"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000"),
        ({"hidden_act": 7}, "Its architecture is not known"),
    ],
    ids=str,
)
def test_without_a_known_architecture_matrices_are_found_by_name_and_it_is_said(
    changes: dict[str, object] | None, words: str, tmp_path: Path
) -> None:
    folder, masks = pruned_folder(tmp_path / "model")
    if changes is None:
        (folder / "config.json").unlink()
    else:
        config_of(folder, **changes)
    findings = examined(folder, masks)
    (remark,) = findings.remarks
    assert words in remark and "found by their names" in remark
    assert holding(findings) == ["masks", "pattern"]
    assert {found.part.name for found in findings.matrices} == {
        matrix.name for layer in find_matrices(model_of("llama")) for matrix in layer
    }


def test_by_name_routers_norms_and_embeddings_are_no_matrices(tmp_path: Path) -> None:
    folder, _ = pruned_folder(tmp_path / "model", "mixtral")
    (folder / "config.json").unlink()
    names = {found.part.name.rpartition(".")[0].rpartition(".")[2] for found in examined(folder).matrices}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"}


def test_tensors_named_otherwise_than_in_the_architecture_are_found_by_name(tmp_path: Path) -> None:
    folder, _ = pruned_folder(tmp_path / "model")
    content = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.layers.", "net.blocks."): tensor for name, tensor in content.items()}
    change(folder, **dict.fromkeys((name.replace(".", "__") for name in content), None))
    change(folder, **{name.replace(".", "__"): tensor for name, tensor in renamed.items()})
    findings = examined(folder)
    assert "named otherwise" in findings.remarks[0] and len(findings.matrices) == 21


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    folder, _ = pruned_folder(tmp_path / "model")
    config_of(folder, intermediate_size=64)
    with pytest.raises(
        ValueError, match=r"mlp\.\w+_proj\.weight is \(.*\) in its files, and \(.*\) by its config.json"
    ):
        examined(folder)


def test_matrices_that_the_files_lack_are_told(tmp_path: Path) -> None:
    folder, masks = pruned_folder(tmp_path / "model")
    change(folder, **{"model__layers__1__mlp__up_proj__weight": None})
    assert "that the folder lacks: 1, such as model.layers.1.mlp.up_proj.weight" in examined(folder).remarks[0]
    findings = examined(folder, masks)
    assert findings.lacking == ["model.layers.1.mlp.up_proj.weight"] and holding(findings) == ["pattern"]


def test_files_without_any_matrix_are_refused(tmp_path: Path) -> None:
    folder, _ = pruned_folder(tmp_path / "model")
    names = load_file(folder / "model.safetensors").keys() - {"model.norm.weight"}
    change(folder, **dict.fromkeys((name.replace(".", "__") for name in names), None))
    with pytest.raises(ValueError, match="no matrices found"):
        examined(folder)
