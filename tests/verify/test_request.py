"""What is refused before a library is loaded, in one message with the remedy; and the folder of a run."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_recon.verify.request import make_request

ROOT = Path(__file__).parents[2]
LIST_MODULES = """
import atexit, runpy, sys
atexit.register(lambda: print("modules:", *sys.modules, file=sys.stderr))
runpy.run_module("lit_recon.verify", run_name="__main__", alter_sys=True)
"""


def folder_with(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["config.json", "pytorch_model.bin"], "save_pretrained(new_folder)"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "AutoModelForCausalLM.from_pretrained"),
        (["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload"),
        (["model-Q4_K_M.gguf"], "model-Q4_K_M.gguf"),
        (["consolidated.safetensors", "params.json"], "it holds consolidated.safetensors."),
        ([], "it is empty"),
    ],
)
def test_folders_without_safetensors_are_refused_with_the_remedy(names: list[str], words: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", *names)
    with pytest.raises(ValueError) as caught:
        make_request(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_safetensors_beside_pytorch_files_are_enough(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", "pytorch_model.bin", "model.safetensors.index.json")
    assert make_request(folder).folder == folder


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    file = folder_with(tmp_path / "model", "model.safetensors") / "model.safetensors"
    with pytest.raises(ValueError) as caught:
        make_request(file, masks=tmp_path, dense=tmp_path / "no", pattern="4:2", sparsity=50.0, tolerance=-0.5)
    lines = str(caught.value).splitlines()
    words = ["is a file", "no such folder", "--masks", "--pattern 4:2", "--sparsity 50.0", "--tolerance -0.5"]
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))


@pytest.mark.parametrize("pattern", ["2", "2:4:8", "0:4", "4:4", "a:b", "2-4", "-2:4", "2:4000", "", "2.0:4"])
def test_what_is_no_pattern_is_refused(pattern: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", "model.safetensors")
    with pytest.raises(ValueError, match="expected N:M with 0 < N < M"):
        make_request(folder, pattern=pattern)


@pytest.mark.parametrize("numbers", [{"sparsity": float("nan")}, {"sparsity": 0.0}, {"tolerance": 0.1}])
def test_numbers_that_mean_nothing_are_refused(numbers: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--sparsity"):
        make_request(folder_with(tmp_path / "model", "model.safetensors"), **numbers)


def test_the_folder_of_a_run_stands_for_its_checkpoint_and_masks(tmp_path: Path) -> None:
    run = folder_with(tmp_path / "run", "results.json")
    checkpoint = folder_with(run / "checkpoint", "model.safetensors")
    unfinished = make_request(run)
    assert (unfinished.folder, unfinished.masks) == (checkpoint, None)
    assert "has no masks.safetensors" in str(unfinished.note)
    (run / "masks.safetensors").touch()
    request = make_request(run)
    assert (request.folder, request.masks) == (checkpoint, run / "masks.safetensors")
    assert "its checkpoint/ and masks.safetensors are looked at" in str(request.note)
    (tmp_path / "others.safetensors").touch()
    assert make_request(run, masks=tmp_path / "others.safetensors").masks == tmp_path / "others.safetensors"
    direct = make_request(checkpoint)
    assert (direct.masks, direct.note) == (None, None)


@pytest.mark.parametrize("arguments", [["--help"], ["nowhere"], ["nowhere", "--pattern", "2of4"]], ids=" ".join)
def test_help_and_refusals_load_no_library(arguments: list[str]) -> None:
    command = [sys.executable, "-c", LIST_MODULES, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    *said, modules = done.stderr.splitlines()
    loaded = {name.partition(".")[0] for name in modules.split()}
    assert not loaded & {"torch", "transformers", "hydra", "numpy", "rich", "safetensors"}
    assert done.returncode == (0 if "--help" in arguments else 2)
    assert len(said) == len(arguments) // 2 + 1 - ("--help" in arguments), done.stderr
    assert "Traceback" not in done.stderr


def test_help_takes_less_than_a_second_and_a_half() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "lit_recon.verify", "--help"], capture_output=True, cwd=ROOT)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and b"--pattern" in done.stdout
    assert min(seconds) < 1.5
