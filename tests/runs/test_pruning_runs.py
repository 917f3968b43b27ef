"""Complete runs with each way to say what is pruned, where and by what: the files hold it, and bad input is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, content, letter_tokenizer, numbers
from safetensors.torch import load_file, save_file

from lit_recon.model.architectures import tiny_model
from lit_recon.pruning.masks import Masks

ONE_SHOT = ("module=none", "data.evaluation_samples=1")


def results() -> dict[str, Any]:
    return json.loads(Path("run/results.json").read_text())


def saved() -> dict[str, torch.Tensor]:
    return {name: one for path in Path("run/checkpoint").glob("*.safetensors") for name, one in load_file(path).items()}


def kept_share(names: str) -> float:
    """Share of the weights that are not zero, of matrices whose names hold a text."""
    found = [one for name, one in saved().items() if names in name and "layers" in name and one.dim() == 2]
    return sum(int((one != 0).sum()) for one in found) / sum(one.numel() for one in found)


def test_rules_give_matrices_patterns_of_their_own_which_plan_and_results_tell(tiny_run: Callable[..., Ended]) -> None:
    rules = (
        r"sparsity=[{match: 'layers\.0\.', skip: true}, {match: down_proj, n: 1, m: 4}, {match: '.', sparsity: 0.25}]"
    )
    ended = tiny_run(rules, *ONE_SHOT)
    assert ended.status == 0, ended.err
    assert kept_share("layers.0.") == 1 and kept_share("layers.1.mlp.down_proj") == 0.25
    assert kept_share("layers.2.mlp.up_proj") == 0.75
    assert (saved()["model.layers.1.mlp.down_proj.weight"].unflatten(1, (-1, 4)) != 0).sum(-1).max() == 1
    target = results()["sparsity"]["target_by_matrix"]
    assert target["model.layers.0.mlp.down_proj.weight"] == 0 and target["model.layers.1.mlp.down_proj.weight"] == 0.75
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert "sparsity layer 0 all matrices 0.0% unstructured 0% per row" in lines
    assert any(line.startswith("layers 1-2 mlp.down_proj 75.0% 1:4") for line in lines), lines


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_one_threshold_removes_the_lowest_scores_of_a_layer_or_of_the_model(
    tiny_run: Callable[..., Ended], model_folder: Path, scope: str, criterion: str
) -> None:
    ended = tiny_run(f"pattern.scope={scope}", f"criterion={criterion}", "sparsity=0.3", *ONE_SHOT)
    assert ended.status == 0, ended.err
    dense, masks = load_file(model_folder / "model.safetensors"), Masks.load(Path("run/masks.safetensors"))
    groups = [["model.layers"]] if scope == "model" else [[f"model.layers.{index}."] for index in range(3)]
    for (group,) in groups:
        names = [name for name in masks if name.startswith(group)]
        dropped = sum(int((~masks[name]).sum()) for name in names)
        total = sum(masks[name].numel() for name in names)
        assert dropped == int(0.3 * total)
        if criterion == "magnitude":
            kept = torch.cat([dense[name][masks[name]].abs() for name in names])
            gone = torch.cat([dense[name][~masks[name]].abs() for name in names])
            assert gone.max() <= kept.min()
    assert len(set(results()["sparsity"]["target_by_matrix"].values())) > 1


@pytest.mark.parametrize(
    "words",
    [
        ["allocation=owl", "allocation.spread=0.2"],
        ["allocation=error"],
        ["allocation=error", "allocation.sparsity=0.3", "pattern=n_m"],
    ],
    ids=["owl", "error", "error of 2:4"],
)
def test_an_allocation_removes_as_much_as_was_asked_for_but_not_everywhere_the_same(
    tiny_run: Callable[..., Ended], words: list[str]
) -> None:
    ended = tiny_run(*words, *ONE_SHOT)
    assert ended.status == 0, ended.err
    found = results()["sparsity"]
    by_layer = [found["by_matrix"][f"model.layers.{index}.mlp.down_proj.weight"] for index in range(3)]
    assert len(set(by_layer)) > 1
    if "pattern=n_m" in words:
        assert set(by_layer) == {0, 0.5} and 0 < found["prunable"] <= 0.3
    else:
        assert found["prunable"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "words",
    [
        ["allocation=owl", "criterion=sparsegpt", "refine=swaps", "windows=half"],
        pytest.param(["criterion=random", "store=disk"], marks=pytest.mark.slow),
        ["criterion=ria", "store=disk", "windows=matrix", "module=least_squares"],
        ["criterion=ria", "criterion.permute=true", "pattern=n_m", "windows=half"],
        pytest.param(["criterion=sparsegpt", "store=disk", "pattern=n_m"], marks=pytest.mark.slow),
        ["criterion=wanda", "refine=dsnot", "store=disk", "chain.statistics=sparse"],
    ],
    ids=" ".join,
)
def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_run: Callable[..., Ended], command: Callable[..., Ended], words: list[str]
) -> None:
    assert tiny_run(*words).status == 0
    shutil.move("run", "whole")
    assert tiny_run(*words, "stop_after=2").status == 0
    ended = command("resume=run")
    assert ended.status == 0, ended.err
    assert numbers(Path("run")) == numbers(Path("whole"))
    for name in ("checkpoint", "masks.safetensors"):
        one, other = Path("run", name), Path("whole", name)
        assert one.is_dir() == other.is_dir()
        if one.is_dir():
            assert content(one) == content(other)
        else:
            assert one.read_bytes() == other.read_bytes()


def test_a_resumed_run_leaves_out_the_windows_that_it_began_with(
    tiny_run: Callable[..., Ended], command: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_recon.fit.allocate.block_influence", lambda *_: [0.3, 0.1, 0.2])
    assert tiny_run("windows.skip=0.67", "stop_after=1").status == 0
    monkeypatch.setattr("lit_recon.fit.allocate.block_influence", lambda *_: pytest.fail("it was decided"))
    ended = command("resume=run")
    assert ended.status == 0, ended.err
    assert [bool(one["held_out_before"]) for one in results()["windows"]] == [True, False, False]


def test_random_masks_do_not_depend_on_the_walk(tiny_run: Callable[..., Ended]) -> None:
    masks = []
    for windows in ("block", "half", "model"):
        assert tiny_run("criterion=random", f"windows={windows}", "overwrite=true", *ONE_SHOT).status == 0
        masks.append(Path("run/masks.safetensors").read_bytes())
    assert masks[0] == masks[1] == masks[2]
    assert tiny_run("criterion=random", "seed=1", "overwrite=true", *ONE_SHOT).status == 0
    assert Path("run/masks.safetensors").read_bytes() != masks[0]


def test_pruned_is_the_model_that_the_criterion_left_and_training_starts_from_it(
    tiny_run: Callable[..., Ended],
) -> None:
    assert tiny_run("criterion=sparsegpt", *ONE_SHOT).status == 0
    untrained, weights = results(), saved()
    assert untrained["perplexity"]["pruned"] == untrained["perplexity"]["reconstructed"]
    assert untrained["sparsity"]["prunable"] == 0.5
    assert tiny_run("criterion=sparsegpt", "overwrite=true", "data.evaluation_samples=1").status == 0
    trained = results()
    assert trained["perplexity"]["pruned"] == untrained["perplexity"]["pruned"]
    for name, mask in Masks.load(Path("run/masks.safetensors")).unpack().items():
        assert torch.equal(mask, weights[name] != 0), name
        assert not torch.equal(saved()[name], weights[name]), name


def test_masks_of_a_run_prune_another_checkpoint_of_the_same_shapes(
    tiny_run: Callable[..., Ended], tmp_path: Path
) -> None:
    assert tiny_run("criterion=magnitude", *ONE_SHOT).status == 0
    shutil.move("run", "first")
    other = tiny_model("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    other.save_pretrained(tmp_path / "other")
    letter_tokenizer().save_pretrained(tmp_path / "other")
    words = ("criterion=file", "criterion.masks=first/masks.safetensors", "model=hf", "model.name=other")
    ended = tiny_run(*words, *ONE_SHOT)
    assert ended.status == 0, ended.err
    assert Path("run/masks.safetensors").read_bytes() == Path("first/masks.safetensors").read_bytes()
    for name, mask in Masks.load(Path("first/masks.safetensors")).unpack().items():
        assert torch.equal(saved()[name], other.get_parameter(name) * mask), name
    assert results()["sparsity"]["prunable"] == 0.5


def test_someone_elses_pruning_is_taken_from_the_zeros_of_a_model_with_its_weights(
    tiny_run: Callable[..., Ended], tmp_path: Path
) -> None:
    sparse = tiny_model("llama")
    generator, zeros = torch.Generator().manual_seed(3), {}
    with torch.no_grad():
        for name, parameter in sparse.named_parameters():
            if "proj" in name:
                zeros[name] = torch.rand(parameter.shape, generator=generator) < 0.4
                parameter.mul_(1.25).masked_fill_(zeros[name], 0)
    sparse.save_pretrained(tmp_path / "sparse")
    assert tiny_run("criterion=zeros", "criterion.name=sparse", *ONE_SHOT).status == 0
    for name in zeros:
        assert torch.equal(saved()[name], sparse.get_parameter(name)), name
    assert results()["sparsity"]["prunable"] == pytest.approx(0.4, abs=0.01)
    assert tiny_run("criterion=zeros", "criterion.name=sparse", "overwrite=true").status == 0
    before, after = (results()["perplexity"][state] for state in ("pruned", "reconstructed"))
    assert after < before
    for name, gone in zeros.items():
        assert torch.equal(saved()[name] == 0, gone), name


def test_a_model_that_is_sparse_itself_keeps_its_zeros(tiny_run: Callable[..., Ended], tmp_path: Path) -> None:
    assert tiny_run("criterion=magnitude", *ONE_SHOT).status == 0
    shutil.move("run/checkpoint", tmp_path / "sparse")
    ended = tiny_run("criterion=zeros", "model=hf", "model.name=sparse", "overwrite=true", "data.evaluation_samples=1")
    assert ended.status == 0, ended.err
    assert results()["sparsity"]["prunable"] == 0.5
    assert results()["gap_recovered"] is None, "nothing is lost"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sparsity=[{match: q_prj, sparsity: 0.5}]"], "sparsity[0].match='q_prj': expected to match some of these"),
        (["sparsity=[{match: q_proj, sparsity: 0.5}]"], "no rule matches model.layers.{0..2}.self_attn.k_proj.weight"),
        (["sparsity=[{match: '(', sparsity: 0.5}]"], "sparsity[0].match='('"),
        (["sparsity=[{match: q_proj, n: 2, m: 5}]", "pattern=n_m"], "pattern.m=5 does not divide"),
        (["sparsity=[{match: '.', sparsity: 0.5}]", "allocation=owl"], "both say where how much goes"),
        (["allocation=owl", "pattern=n_m"], "allocation=owl with pattern 2:4"),
        (["allocation=error", "pattern=n_m"], "give allocation.sparsity, below that"),
        (["allocation=error", "sparsity=0.99"], "no layer may lose more than 0.95"),
        (["allocation=owl", "allocation.spread=2"], "allocation.spread=2"),
        (["pattern.scope=model", "chain.statistics=sparse"], "one threshold is found before the walk"),
        (["pattern.scope=models"], "expected one of row, matrix, layer, model"),
        (["criterion=file"], "criterion.masks has no value"),
        (["criterion=file", "criterion.masks=none.safetensors"], "no such file"),
        (["criterion=zeros"], "has no zeros in its matrices"),
        (["criterion=zeros", "criterion.name=nowhere"], "nowhere"),
        (["criterion=zeros", "sparsity=0.5"], "masks are given, and so is how much goes"),
        (["criterion=sparsegpt", "criterion.block_size=0"], "criterion.block_size=0"),
        (["criterion=sparsegpt", "chain.statistics=sparse", "prune_by=model"], "use prune_by=window"),
        (["criterion=ria", "criterion.permute=true"], "with N:M patterns alone"),
        (
            ["criterion=ria", "criterion.permute=true", "pattern=n_m", "refine=swaps"],
            "criterion.permute=true with refine",
        ),
        (["refine=swap"], "refine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_pruned_is_refused_before_anything_is_written(
    tiny_run: Callable[..., Ended], words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # one that is not reached is tried for long
    ended = tiny_run(*words)
    assert ended.status == 2 and said in " ".join(ended.err.split()), ended.err
    assert "Traceback" not in ended.err and not Path("run").exists()


def test_masks_of_another_model_are_refused_by_name(
    tiny_run: Callable[..., Ended], model_folder: Path, tmp_path: Path
) -> None:
    assert tiny_run(*ONE_SHOT).status == 0
    shutil.move("run", "first")
    masks = Masks.load(Path("first/masks.safetensors")).unpack()
    masks["model.layers.0.mlp.up_proj.weight"] = masks["model.layers.0.mlp.up_proj.weight"][:, :8]
    del masks["model.layers.1.mlp.up_proj.weight"]
    Masks.pack(masks).save(Path("other.safetensors"))
    ended = tiny_run("criterion=file", "criterion.masks=other.safetensors")
    assert ended.status == 2
    assert "there is no mask for model.layers.1.mlp.up_proj.weight" in ended.err
    assert "other shapes model.layers.0.mlp.up_proj.weight is (" in " ".join(ended.err.split())
    save_file({"weight": torch.zeros(2)}, "model.safetensors")
    ended = tiny_run("criterion=file", "criterion.masks=model.safetensors")
    assert ended.status == 2 and "not a file of masks" in ended.err
