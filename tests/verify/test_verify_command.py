"""The command `python -m lit_recon.verify`: exit statuses, table, JSON, refusals; and on the folder of a real run."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ended, model_of
from safetensors.torch import load_file, save_file
from tiny_folders import change, pruned_folder, read, refused, save

from lit_recon.pruning.masks import Masks
from lit_recon.verify.__main__ import main

ROOT = Path(__file__).parents[2]
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder_and_masks(tmp_path: Path) -> tuple[Path, Path]:
    """A 2:4 Llama, and its masks."""
    return pruned_folder(tmp_path / "model")


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command in this process: its exit status, and what it prints."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        return main([str(argument) for argument in arguments]), capsys.readouterr().out

    return run


def strict(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_everything_that_is_asked_holds(
    folder_and_masks: tuple[Path, Path], verify: Callable[..., tuple[int, str]]
) -> None:
    folder, masks = folder_and_masks
    status, said = verify(folder, "--masks", masks, "--pattern", "2:4", "--sparsity", 0.5)
    assert status == 0
    *_, summary, verdict = said.splitlines()
    assert summary.startswith("zero: 50.0% of the weights of 21 matrices with masks, ") and summary.endswith(
        "each of these matrices: 2:4"
    )
    assert verdict == (
        "masked weights are zero in 21 of 21 matrices: yes; 2:4 in 21 of 21 matrices: yes; "
        "sparsity 0.5, where 0.5 is asked for: yes"
    )


def test_rows_are_kinds_of_matrices_over_all_layers_unless_all_are_asked_for(
    folder_and_masks: tuple[Path, Path], verify: Callable[..., tuple[int, str]]
) -> None:
    folder, _ = folder_and_masks
    status, said = verify(folder)
    rows = [line.split() for line in said.splitlines() if "proj" in line]
    assert status == 0 and len(rows) == 7
    assert ["model.layers.*.mlp.up_proj.weight", "3", "48", "x", "32", "50.0%", "2:4"] in rows
    status, said = verify(folder, "--all")
    rows = [line.split() for line in said.splitlines() if "proj" in line]
    assert status == 0 and len(rows) == 21
    assert [NAME, "1", "48", "x", "32", "50.0%", "2:4"] in rows


def test_one_weight_that_came_back_is_named_and_the_status_is_1(
    folder_and_masks: tuple[Path, Path], verify: Callable[..., tuple[int, str]]
) -> None:
    folder, masks = folder_and_masks
    weight = read(folder, NAME)
    weight[7, 2] = 1e-6
    change(folder, **{NAME.replace(".", "__"): weight})
    status, said = verify(folder, "--masks", masks, "--pattern", "2:4")
    assert status == 1
    assert f"{NAME}: 1 of 768 masked weights are not zero" in said
    assert f"{NAME}: 1 of 384 groups of 4 hold more than 2 weights that are not zero" in said
    assert said.splitlines()[-1] == (
        "masked weights are zero in 20 of 21 matrices (not zero: 1): no; 2:4 in 20 of 21 matrices: no"
    )
    assert verify(folder, "--pattern", "3:4")[0] == 0
    assert verify(folder)[0] == 0, "nothing was asked"


def test_sparsity_below_what_is_asked_is_status_1_but_for_the_tolerance(
    folder_and_masks: tuple[Path, Path], verify: Callable[..., tuple[int, str]]
) -> None:
    folder, _ = folder_and_masks
    assert verify(folder, "--sparsity", 0.5005)[0] == 0
    status, said = verify(folder, "--sparsity", 0.502)
    assert status == 1 and said.splitlines()[-1] == "sparsity 0.5, where 0.502 is asked for: no"
    assert verify(folder, "--sparsity", 0.502, "--tolerance", 0.01)[0] == 0
    assert verify(folder, "--sparsity", 0.5005, "--tolerance", 0)[0] == 1


def test_a_pattern_that_does_not_divide_the_inputs_does_not_hold(
    folder_and_masks: tuple[Path, Path], verify: Callable[..., tuple[int, str]]
) -> None:
    status, said = verify(folder_and_masks[0], "--pattern", "4:7")
    assert status == 1 and "model.layers.0.mlp.up_proj.weight: 7 does not divide its inputs (48 x 32)" in said


def test_long_lists_are_cut_short_unless_all_are_asked_for(
    folder_and_masks: tuple[Path, Path], verify: Callable[..., tuple[int, str]]
) -> None:
    said = verify(folder_and_masks[0], "--pattern", "1:4")[1]
    assert said.count("hold more than 1 weights") == 12 and "... and 9 more lines, which --all prints" in said
    assert verify(folder_and_masks[0], "--pattern", "1:4", "--all")[1].count("hold more than 1 weights") == 21


def test_masks_of_other_matrices_and_other_shapes_are_named(
    folder_and_masks: tuple[Path, Path], tmp_path: Path, verify: Callable[..., tuple[int, str]]
) -> None:
    folder, path = folder_and_masks
    masks = Masks.load(path)
    masks.add("model.layers.9.mlp.up_proj.weight", masks[NAME])
    masks.add(NAME, masks[NAME][:, 1:])
    masks.save(tmp_path / "other.safetensors")
    status, said = verify(folder, "--masks", tmp_path / "other.safetensors", "--pattern", "2:4")
    assert status == 1
    assert "model.layers.9.mlp.up_proj.weight: has a mask, and the folder lacks it" in said
    assert f"{NAME}: its mask is (48, 31), and it is (48, 32)" in said
    assert said.splitlines()[-1] == (
        "masked weights are zero in 20 of 20 matrices (masks of matrices that the folder lacks: 1, masks that do not "
        "fit: 1): no; 2:4 in 20 of 20 matrices: yes"
    )


def test_matrices_without_masks_are_not_asked_where_masks_are_given(
    folder_and_masks: tuple[Path, Path], tmp_path: Path, verify: Callable[..., tuple[int, str]]
) -> None:
    folder, path = folder_and_masks
    masks = Masks.load(path)
    Masks.pack({name: masks[name] for name in masks if name != NAME}).save(tmp_path / "fewer.safetensors")
    change(folder, **{NAME.replace(".", "__"): read(folder, NAME) + 1})
    status, said = verify(folder, "--masks", tmp_path / "fewer.safetensors", "--pattern", "2:4", "--all")
    assert status == 0 and "no mask" in next(line for line in said.splitlines() if line.lstrip().startswith(NAME))
    assert verify(folder, "--pattern", "2:4")[0] == 1


def test_a_fine_tuned_folder_is_compared_with_the_dense_one(
    folder_and_masks: tuple[Path, Path], tmp_path: Path, verify: Callable[..., tuple[int, str]]
) -> None:
    folder, masks = folder_and_masks
    dense = save(model_of("llama"), tmp_path / "dense")
    content = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in content.items()}, folder / "model.safetensors")
    status, said = verify(folder, "--masks", masks, "--dense", dense)
    assert status == 0, "zeros are still there, and nothing else was asked for"
    (row,) = [line.split() for line in said.splitlines() if "up_proj" in line]
    assert row[-2:] == ["50.0%", "50.0%"]
    largest = max(float((content[name] / 2).abs().max()) for name in Masks.load(masks))
    assert f"dense model's values: 0; matrices whose kept weights differ: 21, by {largest:.3g} at most" in said
    assert "model.norm.weight: 32 of 32 numbers differ" in said
    lines = verify(folder, "--dense", dense, "--all")[1].splitlines()
    assert "lm_head.weight: 2,048 of 2,048 numbers differ" in lines


def test_json_says_everything_and_is_strict(
    folder_and_masks: tuple[Path, Path], tmp_path: Path, verify: Callable[..., tuple[int, str]]
) -> None:
    folder, masks = folder_and_masks
    dense = save(model_of("llama"), tmp_path / "dense")
    weight = read(folder, NAME)
    weight[7, 2], weight[0, 0] = 2.0, math.nan
    change(folder, **{NAME.replace(".", "__"): weight})
    arguments = (folder, "--masks", masks, "--dense", dense, "--pattern", "2:4", "--sparsity", 0.4, "--json")
    status, said = verify(*arguments)
    found = strict(said)
    assert status == 1 and found["holds"] is False
    assert [(one["asked"], one["holds"]) for one in found["verdicts"]] == [
        ("masks", False),
        ("pattern", False),
        ("sparsity", True),
    ]
    (matrix,) = [one for one in found["matrices"] if one["name"] == NAME]
    assert matrix == {
        "name": NAME,
        "shape": [48, 32],
        "dtype": "F32",
        "input_dim": 1,
        "weights": 1536,
        "zeros": 767,
        "patterns": ["3:4", "6:8", "12:16"],
        "groups": 384,
        "over": 1,
        "masked": 768,
        "masked_nonzero": 1,
        "sparsity": 767 / 1536,
    }
    (changed,) = [one for one in found["comparison"]["changes"] if one["name"] == NAME]
    assert (changed["pruned"], changed["kept"], changed["largest"]) == (767, 2, None)
    assert found["patterns"] == ["3:4", "6:8", "12:16"]
    assert (found["folder"], found["masks"], found["dense"]) == (str(folder), str(masks), str(dense))
    assert strict(verify(folder, "--json")[1])["holds"] is None


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"{}"])
def test_damaged_files_are_refused(
    content: bytes, folder_and_masks: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, masks = folder_and_masks
    masks.write_bytes(content)
    message = refused(capsys, folder, "--masks", masks)
    assert f"--masks {masks}: no masks as lit_recon writes them" in message and message.count("\n") == 1
    (folder / "model.safetensors").write_bytes(content)
    message = refused(capsys, folder)
    assert f"{folder}: model.safetensors is cut short, damaged or a Git LFS pointer" in message
    assert message.count("\n") == 1


def test_safetensors_that_are_no_masks_are_refused(
    folder_and_masks: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, masks = folder_and_masks
    assert "no masks as lit_recon writes them" in refused(capsys, folder, "--masks", folder / "model.safetensors")
    tensors, about = Masks.load(masks).tensors(), Masks.load(masks).metadata()
    save_file(tensors | {NAME: tensors[NAME][1:].clone()}, masks, about)
    assert f"{NAME} has (191,) bytes for a mask of shape (48, 32)" in refused(capsys, folder, "--masks", masks)


def quantise(folder: Path, method: str, **about: object) -> None:
    path = folder / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method} | about})
    )


PACKED = {
    "gptq": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
    "awq": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
    "compressed-tensors": {"weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64},
    "sparse-24": {"compressed": torch.int8, "bitmask": torch.uint8},
    "bitsandbytes": {"weight": torch.uint8, "weight__absmax": torch.float32, "weight__quant_map": torch.float32},
}


@pytest.mark.parametrize("has_config", [True, False], ids=["config", "no config"])
@pytest.mark.parametrize("method", PACKED)
def test_packed_weights_are_refused_with_the_reason(
    method: str, has_config: bool, folder_and_masks: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, masks = folder_and_masks
    stem = NAME.removesuffix(".weight").replace(".", "__")
    codes = {f"{stem}__{name}": torch.ones(768, 1).to(dtype) for name, dtype in PACKED[method].items()}
    change(folder, **({f"{stem}__weight": None} | codes))
    quantise(folder, method)
    if not has_config:
        (folder / "config.json").unlink()
    for arguments in ([folder], [folder, "--masks", masks, "--json"]):
        message = refused(capsys, *arguments)
        assert message.count("\n") == 1 and "stored packed" in message and NAME.removesuffix(".weight") in message
        assert (method if has_config else "does not name") in message
        assert "Look at the model that was quantised, or at a dequantised copy." in message


def test_packed_experts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = pruned_folder(tmp_path / "model", "gpt_oss")
    name = "model__layers__0__mlp__experts__down_proj"
    blocks = torch.zeros(4, 32, 1, 16, dtype=torch.uint8)
    change(folder, **{name: None, f"{name}_blocks": blocks, f"{name}_scales": blocks[..., 0].clone()})
    quantise(folder, "mxfp4")
    assert "stored packed by mxfp4: 1, such as model.layers.0.mlp.experts.down_proj;" in refused(capsys, folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_codes_of_one_weight_each_are_looked_at_and_it_is_said(
    dtype: torch.dtype,
    folder_and_masks: tuple[Path, Path],
    verify: Callable[..., tuple[int, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, masks = folder_and_masks
    name = NAME.replace(".", "__")
    weight = read(folder, NAME)
    codes = weight.sign().to(dtype) if dtype == torch.int8 else weight.to(dtype)
    codes = torch.where(weight == 0, torch.zeros((), dtype=torch.int8), codes) if dtype == torch.int8 else codes
    scale = torch.ones(48, 1)
    change(folder, **{name: codes, f"{name}_scale": scale, f"{name}_zero_point": torch.zeros(48, 1, dtype=torch.int8)})
    status, said = verify(folder, "--masks", masks, "--pattern", "2:4")
    assert status == 0 and "Quantised matrices: 1" in said and "a code of 0 is taken for a weight of 0" in said
    change(folder, **{f"{name}_zero_point": torch.full((48, 1), 3, dtype=torch.int8)})
    assert "stored packed" in refused(capsys, folder, "--masks", masks)


def test_the_folder_of_a_run_is_as_the_run_says(
    run_once: Callable[..., Ended], model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_once()
    results = json.loads(Path("run/results.json").read_text())
    capfd.readouterr()
    checkpoint = [
        "run/checkpoint",
        "--masks",
        "run/masks.safetensors",
        "--sparsity",
        "0.5",
        "--tolerance",
        "0",
        "--json",
    ]
    assert main([*checkpoint, "--dense", str(model_folder)]) == 0
    found = strict(capfd.readouterr().out)
    assert found["sparsity"]["matrices"] == pytest.approx(results["sparsity"]["prunable"])
    assert found["sparsity"]["total"] == pytest.approx(results["sparsity"]["total"])
    assert {one["name"]: one["sparsity"] for one in found["matrices"]} == results["sparsity"]["by_matrix"]
    changed = {one["name"] for one in found["comparison"]["changes"]}
    assert changed >= {one["name"] for one in found["matrices"]}
    assert changed.isdisjoint({"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"})
    assert main(["run"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "run is the folder of a run: its checkpoint/ and masks.safetensors are looked at"
    assert said[-1] == "masked weights are zero in 21 of 21 matrices: yes"
    assert main(["run", "--pattern", "2:4"]) == 1


def test_a_run_with_a_pattern_in_16_bits(run_once: Callable[..., Ended], capfd: pytest.CaptureFixture[str]) -> None:
    run_once("pattern=n_m", "pattern.n=2", "pattern.m=4", "model.dtype=bfloat16")
    capfd.readouterr()
    assert main(["run", "--pattern", "2:4", "--sparsity", "0.5"]) == 0
    assert "2:4 in 21 of 21 matrices: yes" in capfd.readouterr().out


def test_exit_statuses_of_the_process(folder_and_masks: tuple[Path, Path]) -> None:
    folder, masks = folder_and_masks
    weight = read(folder, NAME)
    weight[7, 2] = 1.0
    change(folder, **{NAME.replace(".", "__"): weight})
    done = subprocess.run(
        [sys.executable, "-m", "lit_recon.verify", str(folder), "--masks", str(masks)],
        **{"capture_output": True, "text": True, "timeout": 300, "cwd": ROOT},
    )
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.splitlines()[-1].endswith("in 20 of 21 matrices (not zero: 1): no")
