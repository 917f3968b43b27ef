"""Masks of a bit per weight: exact in memory and in their file, and applied to a layer for as long as asked."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import model_of
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.model.decoder import decoder_layers
from lit_recon.model.matrices import layer_matrices
from lit_recon.pruning.masks import Masks

SHAPES = [(1,), (7,), (8,), (3, 5), (16, 9), (2, 3, 11)]


def random_masks() -> dict[str, Tensor]:
    """Masks of every shape, most of them not a multiple of eight weights."""
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.weight": torch.rand(shape, generator=generator) < 0.4 for i, shape in enumerate(SHAPES)}


def packed(masks: dict[str, Tensor]) -> Masks:
    return Masks.pack(masks)


def assert_same_masks(read: Masks, masks: dict[str, Tensor]) -> None:
    assert set(read) == set(masks) and len(read) == len(masks)
    for name, mask in masks.items():
        assert read[name].dtype == torch.bool and torch.equal(read[name], mask), name


def test_packed_masks_are_bit_exact() -> None:
    masks = random_masks()
    assert_same_masks(packed(masks), masks)


def test_masks_of_transposed_matrices_are_packed_in_the_weights_own_order() -> None:
    mask = random_masks()["layers.4.weight"].T
    assert torch.equal(packed({"weight": mask})["weight"], mask)


def test_masks_survive_their_file_which_has_a_bit_per_weight(tmp_path: Path) -> None:
    masks = random_masks()
    packed(masks).save(tmp_path / "masks.safetensors")
    assert_same_masks(Masks.load(tmp_path / "masks.safetensors"), masks)
    with safe_open(tmp_path / "masks.safetensors", framework="pt") as file:
        for name, mask in masks.items():
            bits = file.get_tensor(name)
            assert bits.dtype == torch.uint8 and bits.numel() == -(-mask.numel() // 8)
            by_hand = [(int(bits[i // 8]) >> (7 - i % 8)) & 1 for i in range(mask.numel())]  # big endian, as documented
            assert by_hand == mask.flatten().int().tolist()
        assert json.loads(file.metadata()["shapes"]) == {name: list(mask.shape) for name, mask in masks.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["masks.safetensors"]


def test_masks_that_were_read_can_be_written_again_with_the_same_bytes(tmp_path: Path) -> None:
    packed(random_masks()).save(tmp_path / "first")
    Masks.load(tmp_path / "first").save(tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_later_masks_take_the_place_of_earlier_ones_and_join_those_of_other_matrices() -> None:
    masks = random_masks()
    made = packed(masks)
    others = {"layers.3.weight": ~masks["layers.3.weight"], "new": torch.tensor([True, False, True])}
    made.update(packed(others))
    assert_same_masks(made, masks | others)


def half_of_each(model: PreTrainedModel, *, but: int = 0) -> dict[str, Tensor]:
    """A random mask for each matrix of layer 1 from the `but`-th on."""
    _, layers = decoder_layers(model)
    generator = torch.Generator().manual_seed(0)
    return {
        matrix.name: torch.rand(matrix.weight.shape, generator=generator) < 0.5
        for matrix in layer_matrices(layers[1], f"{decoder_layers(model)[0]}.1")[but:]
    }


def test_a_layer_is_pruned_as_long_as_masks_are_applied_and_nothing_else_is_touched(model: PreTrainedModel) -> None:
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    homes = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    prefix, layers = decoder_layers(model)
    masks = half_of_each(model, but=1)  # the first matrix has none and stays dense
    assert masks
    with packed(masks).applied(layers[1], f"{prefix}.1"):
        for name, parameter in model.named_parameters():
            expected = torch.where(masks[name], dense[name], 0.0) if name in masks else dense[name]
            assert torch.equal(parameter, expected), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense[name]) and parameter.data_ptr() == homes[name], name


def test_masks_of_one_layer_do_not_prune_another() -> None:
    model = model_of("llama")
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with packed(half_of_each(model)).applied(model.model.layers[2], "model.layers.2"):
        assert all(torch.equal(parameter, dense[name]) for name, parameter in model.named_parameters())


def test_a_layer_is_dense_again_after_an_error_too() -> None:
    model = model_of("llama")
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(KeyError), packed(half_of_each(model)).applied(model.model.layers[1], "model.layers.1"):
        raise KeyError
    assert all(torch.equal(parameter, dense[name]) for name, parameter in model.named_parameters())


def test_a_pruned_weight_that_is_not_exactly_zero_is_found_and_its_matrix_named(model: PreTrainedModel) -> None:
    masks = half_of_each(model)
    made = packed(masks)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    zeros = {name: mask.numel() - int(mask.sum()) for name, mask in masks.items()}
    assert made.count_zeros(model) == zeros
    name = list(masks)[-1]
    with torch.no_grad():
        model.get_parameter(name)[~masks[name]] = 1e-30
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        made.count_zeros(model)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_masks_that_could_not_be_written_whole_leave_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "masks.safetensors"
    masks = random_masks()
    packed(masks).save(path)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, fails, fail)
    for target in (path, tmp_path / "new.safetensors"):
        with pytest.raises(OSError, match="no space left"):
            packed({"other": torch.ones(3, dtype=torch.bool)}).save(target)
    assert_same_masks(Masks.load(path), masks)
    assert [found.name for found in tmp_path.iterdir()] == ["masks.safetensors"]
