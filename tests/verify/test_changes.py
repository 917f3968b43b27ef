"""How tensors differ from those of the dense model: by hand, and on tiny folders."""

import math
from pathlib import Path

import pytest
import torch
from conftest import model_of
from safetensors.torch import load_file
from tiny_folders import change, prune, pruned_folder, read, save
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.model.architectures import tiny_model
from lit_recon.verify import changes
from lit_recon.verify.changes import Change, Comparison, compare
from lit_recon.verify.findings import examine
from lit_recon.verify.request import Request


def compared(here: Tensor, dense: Tensor) -> Change:
    found = Change("x", ("", ""), is_matrix=True)
    compare(found, here, dense)
    return found


def comparison(folder: Path, dense: Path) -> Comparison:
    found = examine(Request(folder=folder, dense=dense)).comparison
    assert found is not None
    return found


def test_pruned_and_changed_numbers_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "CHUNK", 3)
    here = torch.tensor([[0.0, 1.0, 2.5, 0.0], [-1.0, -0.0, 7.0, 3.0]])
    dense = torch.tensor([[5.0, 1.0, 2.0, 0.0], [1.0, 0.0, 7.0, 0.0]])
    found = compared(here, dense)
    assert (found.numbers, found.pruned, found.kept, found.largest) == (8, 1, 3, 3.0)
    assert not found.is_rounding


def test_what_is_no_number_in_both_is_the_same_and_in_one_differs() -> None:
    nan = math.nan
    same = compared(torch.tensor([nan, 1.0]), torch.tensor([nan, 1.0]))
    assert (same.pruned, same.kept) == (0, 0)
    found = compared(torch.tensor([nan, 1.0, 5.0]), torch.tensor([2.0, 1.0, 4.0]))
    assert found.kept == 2 and math.isnan(found.largest)


def test_another_dtype_is_compared_in_the_wider_one_and_rounding_is_told() -> None:
    dense = torch.tensor([1.0, 1.001, 0.5])
    rounded = compared(dense.bfloat16(), dense)
    assert (rounded.kept, rounded.is_rounding) == (1, True)
    assert rounded.largest == pytest.approx(0.001, rel=1e-3)
    other = compared(torch.tensor([1.0, 1.001, 0.75]).bfloat16(), dense)
    assert (other.kept, other.is_rounding) == (2, False)
    exact = compared(dense.bfloat16().float(), dense.bfloat16())
    assert (exact.pruned, exact.kept) == (0, 0)
    halves = compared(torch.tensor([2049.0]).bfloat16(), torch.tensor([2050.0]).half())  # 2048 and 2050
    assert (halves.kept, halves.largest) == (1, 2.0)


def test_other_kinds_of_numbers_are_compared_too() -> None:
    assert compared(torch.tensor([True, False]), torch.tensor([True, True])).pruned == 1
    assert compared(torch.tensor([2**60 + 1, 4]), torch.tensor([2**60, 4])).kept == 1


def test_a_pruned_model_differs_in_pruned_weights_only(tmp_path: Path) -> None:
    dense = save(model_of("llama"), tmp_path / "dense")
    folder, _ = pruned_folder(tmp_path / "model")
    found = comparison(folder, dense)
    assert len(found.changes) == 21 and all(one.is_matrix and not one.kept for one in found.changes)
    weights = load_file(dense / "model.safetensors")
    assert {one.name: one.pruned for one in found.changes} == {
        one.name: weights[one.name].numel() // 2 for one in found.changes
    }
    assert found.same == len(weights) - 21
    assert not (found.mismatched or found.only_here or found.only_dense)


def test_fine_tuning_is_told_by_matrix_and_by_other_tensor(tmp_path: Path) -> None:
    dense = save(model_of("llama"), tmp_path / "dense")
    folder, _ = pruned_folder(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    weight, norm = read(folder, name), read(folder, "model.norm.weight")
    weight[3, 4] += 0.5
    change(folder, **{name.replace(".", "__"): weight, "model__norm__weight": norm + 1})
    found = comparison(folder, dense)
    assert [(one.name, one.kept, one.largest) for one in found.changes if one.is_matrix and one.kept] == [
        (name, 1, pytest.approx(0.5))
    ]
    assert [(one.name, one.kept) for one in found.changes if not one.is_matrix] == [("model.norm.weight", len(norm))]


def test_shapes_dtypes_and_tensors_of_one_side_are_named(tmp_path: Path) -> None:
    dense = save(model_of("llama"), tmp_path / "dense")
    folder, _ = pruned_folder(tmp_path / "model")
    head, norm = read(folder, "lm_head.weight"), read(folder, "model.norm.weight")
    change(
        folder,
        lm_head__weight=head[:-1].clone(),
        model__norm__weight=norm.bfloat16(),
        model__layers__0__input_layernorm__weight=None,
        extra=norm,
        codes=norm.to(torch.int8),
    )
    change(dense, codes=norm)
    found = comparison(folder, dense)
    assert sorted(found.mismatched) == [
        "codes: I8, of the dense model F32",
        f"lm_head.weight: shape {(len(head) - 1, 32)}, of the dense model {(len(head), 32)}",
    ]
    (rounded,) = [one for one in found.changes if not one.is_matrix]
    assert (rounded.name, rounded.dtypes, rounded.is_rounding) == ("model.norm.weight", ("BF16", "F32"), True)
    assert found.only_here == ["extra"]
    assert found.only_dense == ["model.layers.0.input_layernorm.weight"]


def without_head(model: PreTrainedModel) -> PreTrainedModel:
    return model.transformer


@pytest.mark.parametrize("which", ["here", "dense"])
def test_names_without_the_prefix_of_the_base_model_are_the_same_tensors(which: str, tmp_path: Path) -> None:
    models = {"here": tiny_model("gpt2"), "dense": tiny_model("gpt2")}
    prune(models["here"])
    models[which] = without_head(models[which])
    found = comparison(*(save(model, tmp_path / name) for name, model in models.items()))
    assert len(found.changes) == 12 and all(one.is_matrix for one in found.changes)
    assert not (found.mismatched or found.only_here or found.only_dense)


def test_a_head_that_is_tied_may_be_stored_or_not(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    folder, dense = save(model, tmp_path / "here"), save(model, tmp_path / "dense")
    change(dense, lm_head__weight=read(dense, "model.embed_tokens.weight"))
    for pair in ((folder, dense), (dense, folder)):
        found = comparison(*pair)
        assert not (found.changes or found.mismatched or found.only_here or found.only_dense)


@pytest.mark.parametrize("which", ["here", "dense"])
def test_experts_that_one_side_has_stacked_are_the_same_tensors(which: str, tmp_path: Path) -> None:
    models = {"here": tiny_model("mixtral"), "dense": tiny_model("mixtral")}
    masks = prune(models["here"])
    folders = [save(model, tmp_path / name, save_original_format=name != which) for name, model in models.items()]
    names = [set(load_file(folder / "model.safetensors")) for folder in folders]
    assert not any("experts.0" in name for name in names[which == "dense"])
    assert any("experts.0" in name for name in names[which == "here"])
    found = comparison(*folders)
    parts = [one.part for one in examine(Request(folder=folders[0])).matrices]
    assert not (found.mismatched or found.only_here or found.only_dense)
    assert sum(one.pruned for one in found.changes) == sum(int((~mask).sum()) for mask in masks.values())
    assert not any(one.kept for one in found.changes)
    assert {one.name for one in found.changes} == {part.name for part in parts}
