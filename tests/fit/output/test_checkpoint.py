"""checkpoint/ is what users read: exact zeros, equal logits; of a streamed run at every moment, else whole or not."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import CPU, chain_of, content, letter_tokenizer, masks_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from lit_recon.fit.output.checkpoint import INDEX, Companions, ShardedFolder, save_whole
from lit_recon.model.architectures import VOCABULARY, tiny_model
from lit_recon.model.mapped_files import DenseFiles
from lit_recon.model.matrices import find_matrices
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import partition
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.masks import Masks
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner, prune
from lit_recon.system.atomic_files import replaced_folder


def saved(kind: str, folder: Path, **changes: object) -> PreTrainedModel:
    """A tiny model, read from its folder."""
    tiny_model(kind, **changes).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()


SHARD = "model-{:05}-of-00004.safetensors"


def sharded(tmp_path: Path, kind: str = "llama", **changes: object) -> tuple[ShardedFolder, PreTrainedModel]:
    model = saved(kind, tmp_path / "dense", **changes)
    shards = ShardedFolder(tmp_path / "checkpoint", model, DenseFiles([tmp_path / "dense" / "model.safetensors"]))
    shards.start(letter_tokenizer(), "# card\n")
    return shards, model


def layer_file(tmp_path: Path, model: PreTrainedModel, index: int, value: float) -> Path:
    """A finished layer, as a commit has it, all of one value."""
    prefix = f"model.layers.{index}."
    state = {name: torch.full_like(tensor, value) for name, tensor in model.state_dict().items() if prefix in name}
    path = tmp_path / f"layer_{index}_{value}.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    return path


def assert_layers(folder: Path, dense: PreTrainedModel, values: dict[int, float]) -> None:
    """The folder is a model in which these layers have this value and all else is dense."""
    read = AutoModelForCausalLM.from_pretrained(folder)
    state = read.state_dict()
    assert state.keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        index = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        expected = torch.full_like(tensor, values[index]) if index in values else tensor
        assert torch.equal(state[name], expected), name


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("phi", {}), ("gemma2", {}), ("bloom", {})],
)
def test_it_starts_as_the_dense_model_with_a_shard_for_each_layer(tmp_path: Path, kind: str, changes: dict) -> None:
    _, model = sharded(tmp_path, kind, **changes)
    folder = tmp_path / "checkpoint"
    read, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert type(read) is type(model) and read.config.tie_word_embeddings == model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor) and read.state_dict()[name].dtype == tensor.dtype, name
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards == [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in dense.values())
    assert index["weight_map"] == {name: shard for shard in shards for name in load_file(folder / shard)}
    assert index["weight_map"].keys() == dense.keys()
    of_layers = [{name for name in load_file(folder / shard) if ".1." in name} for shard in shards]
    assert of_layers[2] == set(load_file(folder / shards[2])) and not of_layers[0] | of_layers[1] | of_layers[3]
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"] == [2, 3, 4]
    assert (folder / "README.md").read_text() == "# card\n"
    with safe_open(folder / shards[1], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # older transformers ask for it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "dense"]


def test_a_layer_is_put_put_again_and_made_dense(tmp_path: Path) -> None:
    shards, model = sharded(tmp_path)
    before, folder = content(tmp_path / "checkpoint"), tmp_path / "checkpoint"
    shards.put(1, layer_file(tmp_path, model, 1, 2.0))
    assert_layers(folder, model, {1: 2.0})
    shards.put(0, layer_file(tmp_path, model, 0, 3.0))
    shards.put(1, layer_file(tmp_path, model, 1, 4.0))
    assert_layers(folder, model, {0: 3.0, 1: 4.0})
    put = layer_file(tmp_path, model, 1, 4.0).read_bytes()
    shards.mend(letter_tokenizer(), [0])
    assert_layers(folder, model, {0: 3.0})
    assert (tmp_path / "layer_1_4.0.safetensors").read_bytes() == put, "the commit's file is not written into"
    shards.mend(letter_tokenizer(), [])
    assert content(folder) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX, *(SHARD.format(n) for n in (1, 3))])
@pytest.mark.parametrize("how", ["one bit", "cut short", "removed"])
def test_what_was_changed_in_a_checkpoint_is_mended(tmp_path: Path, name: str, how: str) -> None:
    shards, _ = sharded(tmp_path)
    before, path = content(tmp_path / "checkpoint"), tmp_path / "checkpoint" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if how == "one bit" else whole[: len(whole) // 2])
    if how == "removed":
        path.unlink()
    shards.mend(letter_tokenizer(), [])
    assert content(tmp_path / "checkpoint") == before
    assert not list(tmp_path.glob("*.partial"))


def test_a_new_card_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    shards, _ = sharded(tmp_path)
    before = content(tmp_path / "checkpoint")
    shards.describe("# another, with an ä\n")
    assert content(tmp_path / "checkpoint") == before | {"README.md": "# another, with an ä\n".encode()}


@pytest.mark.parametrize("fails", [1, 3, 6])
def test_a_start_that_fails_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    model, count = saved("llama", tmp_path / "dense"), 0
    shards = ShardedFolder(tmp_path / "checkpoint", model, DenseFiles([tmp_path / "dense" / "model.safetensors"]))
    (tmp_path / "checkpoint.partial").mkdir()
    (tmp_path / "checkpoint.partial" / "stray").write_text("of a run that was killed")
    replace = os.replace

    def fail(*arguments: object) -> None:
        nonlocal count
        count += 1
        if count == fails:
            raise OSError("no space left on device")
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            shards.start(letter_tokenizer(), "card")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"] and not shards.is_there()
    shards.start(letter_tokenizer(), "card")
    assert_layers(tmp_path / "checkpoint", model, {})
    assert not (tmp_path / "checkpoint" / "stray").exists()


def test_a_folder_of_other_files_or_with_one_missing_is_not_there_and_is_replaced(tmp_path: Path) -> None:
    shards, model = sharded(tmp_path)
    assert shards.is_there()
    for name in ("model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors", INDEX):
        (shards.folder / name).unlink()
        assert not shards.is_there()
        shards.start(letter_tokenizer(), "card")
        assert shards.is_there()
    for path in shards.folder.iterdir():
        path.unlink()
    model.save_pretrained(shards.folder)  # as a run that is not streamed does
    assert not shards.is_there()
    shards.start(letter_tokenizer(), "card")
    assert not (shards.folder / "model.safetensors").exists()
    assert_layers(shards.folder, model, {})


def pruned(model: PreTrainedModel) -> Masks:
    """The masks of a model of which every window was pruned and written out."""
    tokens_ST = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    chain, offloader, masks = chain_of(model, tokens_ST, 1), WeightOffloader(model, CPU.device), Masks()
    pruner = Pruner(Magnitude(), Unstructured(sparsity=0.5), chain)
    for window in partition(model):
        offloader.onload(window)
        found = masks_of(pruner, window)
        prune(window, found)
        chain.advance(window)
        offloader.offload(window)
        masks.update(Masks.pack(found))
    return masks


def test_the_saved_folder_is_read_by_transformers_with_exact_zeros_and_equal_logits(
    model: PreTrainedModel, tokens_ST: Tensor, tmp_path: Path
) -> None:
    masks = pruned(model)
    save_whole(tmp_path / "checkpoint", model, letter_tokenizer(), "# card\n")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").eval()
    assert type(read) is type(model)
    assert set(masks) == {matrix.name for layer in find_matrices(model) for matrix in layer}
    for name in masks:
        weight, mask = read.get_parameter(name), masks[name]
        assert torch.count_nonzero(weight[~mask]) == 0, name
        assert torch.count_nonzero(weight[mask]) == mask.sum() and 0.49 < mask.float().mean() < 0.51, name
    with torch.no_grad():
        assert torch.equal(read(tokens_ST, use_cache=False).logits, model(tokens_ST, use_cache=False).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint")("abc")["input_ids"] == [2, 3, 4]
    assert (tmp_path / "checkpoint" / "README.md").read_text() == "# card\n"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_tied_embeddings_stay_tied(tokens_ST: Tensor, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    pruned(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_whole(tmp_path / "checkpoint", model, letter_tokenizer(), "card")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").eval()
    assert read.config.tie_word_embeddings
    assert read.lm_head.weight is read.model.embed_tokens.weight
    with safe_open(tmp_path / "checkpoint" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  # not a dict
    with torch.no_grad():
        assert torch.equal(read(tokens_ST).logits, model(tokens_ST).logits)


@pytest.mark.parametrize(
    "fails", [(PreTrainedModel, "save_pretrained"), (PreTrainedTokenizerFast, "save_pretrained"), (Path, "write_text")]
)
def test_a_save_that_fails_half_way_leaves_no_checkpoint_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: tuple[type, str]
) -> None:
    model = tiny_model("llama")
    pruned(model)
    whole = getattr(*fails)

    def fail(*arguments: object, **settings: object) -> None:
        whole(*arguments, **settings)  # what it writes is there, when the disk is full
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*fails, fail)
        with pytest.raises(OSError, match="no space left"):
            save_whole(tmp_path / "checkpoint", model, letter_tokenizer(), "card")
        assert not (tmp_path / "checkpoint").exists()
    save_whole(tmp_path / "checkpoint", model, letter_tokenizer(), "card")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_folder_with_folders_in_it_takes_the_place_of_another(tmp_path: Path) -> None:
    """As of tokenizers with several chat templates."""
    for text in ("first", "second"):
        with replaced_folder(tmp_path / "made") as partial:
            (partial / "additional_chat_templates").mkdir(parents=True)
            (partial / "additional_chat_templates" / "tool_use.jinja").write_text(text)
        assert (tmp_path / "made" / "additional_chat_templates" / "tool_use.jinja").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        ({}, False),
        ({"modeling_own.py": b""}, False),  # not the tokenizer's
        ({"modeling_own.py": b"", "tokenization_own.py": b""}, True),
    ],
)
def test_the_configuration_names_code_that_is_there_or_none(
    tmp_path: Path, files: dict[str, bytes], kept: bool
) -> None:
    model = tiny_model("llama")
    named = {"AutoModelForCausalLM": "modeling_own.Own", "AutoTokenizer": ["tokenization_own.Own", None]}
    model.config.auto_map = named | {"AutoConfig": "owner/name--configuration_own.Own"}
    save_whole(tmp_path / "checkpoint", model, Companions(letter_tokenizer(), files), "card")
    said = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert ("auto_map" in said) == kept and said["model_type"] == "llama"
    assert {path.name for path in (tmp_path / "checkpoint").glob("*.py")} == files.keys()


def test_companions_never_replace_what_belongs_to_the_pruned_model(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), letter_tokenizer()
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "LICENSE": b"free"}
    save_whole(tmp_path / "checkpoint", model, Companions(tokenizer, files), "card")
    save_whole(tmp_path / "plain", model, tokenizer, "card")
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "checkpoint" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "checkpoint" / "LICENSE").read_bytes() == b"free"
