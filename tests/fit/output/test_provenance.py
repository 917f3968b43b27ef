"""results.json says where all that a run read came from: hashes, commits, states of repositories."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended

from lit_recon.data.files import Files
from lit_recon.data.mixture import Mixture
from lit_recon.data.python_docs import PythonDocs
from lit_recon.fit.output.provenance import hub_commit


def hashed(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def found(run: str = "run") -> dict:
    return json.loads(Path(run, "results.json").read_text())["provenance"]


def test_files_of_model_and_text_are_there_with_their_hashes(
    run_once: Callable[..., Ended], model_folder: Path, text_file: Path
) -> None:
    run_once()
    traced = found()
    assert traced["model"]["revision"] is None, "a folder has none"
    of_model = {path.name: hashed(path) for path in model_folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= of_model.keys()
    assert traced["model"]["files"] == of_model
    assert traced["text"] == {str(text_file): hashed(text_file)}
    assert len(traced["samples"]) == len(traced["code"]) == 64 and traced["masks"] == {}
    assert traced["machine"].keys() >= {"device", "CPU", "threads", "GPU"} and traced["machine"]["CPU"]


LOSS = """
import other


def loss(outputs_ND, targets_ND, **_):
    return (outputs_ND - targets_ND).square().mean(-1)
"""


def test_the_users_own_modules_their_repository_and_masks_are_there(
    run_once: Callable[..., Ended], tiny_run: Callable[..., Ended]
) -> None:
    run_once()
    shutil.move("run/masks.safetensors", "given.safetensors")
    Path("other.py").touch()
    Path("own_loss.py").write_text(LOSS)
    subprocess.run(["git", "init", "--quiet", "."], check=True)
    subprocess.run(["git", "add", "other.py", "own_loss.py"], check=True)
    commit = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "first"]
    subprocess.run(commit, check=True)
    own = ["loss=custom", "loss._target_=own_loss.loss", "criterion=file", "criterion.masks=given.safetensors"]
    ended = tiny_run(*own, "overwrite=true")
    assert ended.status == 0, ended.err
    traced = found()
    assert traced["masks"] == {"given.safetensors": hashed(Path("given.safetensors"))}
    files = {"own_loss.loss": hashed(Path("own_loss.py")), "other": hashed(Path("other.py"))}
    assert files.items() <= traced["modules"].items()
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    here = {"repository": str(Path.cwd()), "commit": head, "dirty": False}
    assert here in traced["git"]["modules"]


def test_files_of_all_sources_within_a_source_count(tmp_path: Path, text_file: Path) -> None:
    names = [tmp_path / f"{letter}.txt" for letter in "abc"]
    for path in names:
        shutil.copy(text_file, path)
    first, second, third = names
    files = Files(paths=[str(first)], evaluation_paths=str(second))
    assert files.text_files() == [first, second]
    mixed = Mixture(
        sources={"one": files, "two": PythonDocs(), "unused": Files(paths=str(third))},
        weights={"one": 1, "two": 1, "unused": 0},
        evaluation=Files(paths=str(second)),
    )
    assert mixed.text_files() == [first, second]


@pytest.mark.parametrize(
    ("path", "commit"),
    [
        (f"/c/models--a--b/snapshots/{'0123456789' * 4}/model.safetensors", "0123456789" * 4),
        ("/c/snapshots/main/model.safetensors", None),
        ("model/model.safetensors", None),
    ],
)
def test_the_commit_of_a_file_of_the_hub_is_that_of_its_snapshot(path: str, commit: str | None) -> None:
    assert hub_commit(Path(path)) == commit
