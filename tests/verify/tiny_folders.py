"""What tests of the command share: tiny models in folders, their weights changed in the files, and what it prints."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.model.architectures import VOCABULARY, tiny_model
from lit_recon.model.verify import verify
from lit_recon.pruning.masks import Masks
from lit_recon.verify.__main__ import main


def two_of_four(weight: Tensor, input_dim: int) -> Tensor:
    """A mask that keeps the first two of every four weights along the last dimension or the one before."""
    kept = torch.tensor([True, True, False, False]).repeat(weight.shape[input_dim] // 4)
    return (kept[:, None] if input_dim == -2 else kept).expand(weight.shape).clone()


def prune(model: PreTrainedModel) -> dict[str, Tensor]:
    """Make a model 2:4 along the inputs of its products, in place; the masks."""
    tokens_BT = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(1))
    masks = {}
    for matrix in (matrix for layer in verify(model, tokens_BT) for matrix in layer):
        assert matrix.input_dim is not None, matrix.name
        masks[matrix.name] = two_of_four(matrix.weight, matrix.input_dim - 2)
        matrix.weight.data.mul_(masks[matrix.name])
    return masks


def save(model: PreTrainedModel, folder: Path, **settings: object) -> Path:
    model.save_pretrained(folder, **settings)
    return folder


def save_masks(masks: Mapping[str, Tensor], path: Path) -> Path:
    Masks.pack(masks).save(path)
    return path


def pruned_folder(folder: Path, shape: str = "llama", **changes: object) -> tuple[Path, Path]:
    """A 2:4 model, and its masks."""
    model = tiny_model(shape, **changes)
    masks = prune(model)
    return save(model, folder), save_masks(masks, folder.with_name(f"{folder.name}.masks.safetensors"))


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of a folder's one file; None: without it. Two underscores stand for a dot."""
    path = folder / "model.safetensors"
    content = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, path, {"format": "pt"})


def read(folder: Path, name: str) -> Tensor:
    return load_file(folder / "model.safetensors")[name]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message with which the command refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    return said.err
