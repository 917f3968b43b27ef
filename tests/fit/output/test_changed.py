"""A finished run is the same only with the same files of model and text; other code is told of."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Ended

import lit_recon
from lit_recon.fit.output import changed
from lit_recon.fit.output.changed import changed_inputs, other_code, read_origin
from lit_recon.fit.output.provenance import seen
from lit_recon.fit.signature import package_hash
from lit_recon.fit.study import Standing, standing
from lit_recon.settings.sweep import Member

MODEL = "files of the dense model"


def hashed(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model folder and text."""
    monkeypatch.chdir(tmp_path)
    for name in ("model/model.safetensors", "model/config.json", "text/a.txt", "text/b.txt", "masks.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"what is in {name}")
    return tmp_path


def config(name: str = "model", **of_data: Any) -> dict[str, Any]:
    data = {"_target_": "lit_recon.data.files.Files", "paths": ["text"]} | of_data
    return {"model": {"_target_": "lit_recon.model.loading.HubModel", "name": name, "revision": None}, "data": data}


def origin() -> dict[str, Any]:
    """What a run with these files would say of them now."""
    of_model, text = [*Path("model").iterdir()], [*Path("text").iterdir()]
    masks = [Path("masks.safetensors")]
    return {
        "model": {"files": {path.name: hashed(path) for path in of_model}},
        "text": {str(path): hashed(path) for path in text},
        "masks": {str(path): hashed(path) for path in masks},
        "seen": seen([*of_model, *text, *masks]),
        "code": package_hash(),
        "versions": {"lit_recon": lit_recon.__version__},
    }


def test_nothing_is_read_again_where_sizes_and_times_are_as_they_were(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = origin()
    monkeypatch.setattr(changed, "sha256", lambda path: pytest.fail(f"{path} was read"))
    assert changed_inputs(then, config()) == []
    Path("model/model.safetensors").write_text("longer than what was there")
    assert changed_inputs(then, config()) == ["files of the dense model are not the same (model.safetensors)"]


def test_a_file_that_was_only_touched_or_copied_is_the_same(here: Path) -> None:
    then = origin()
    os.utime("model/model.safetensors", ns=(1, 1))
    shutil.copytree("model", "elsewhere")
    assert changed_inputs(then, config()) == []
    assert changed_inputs(then, config("elsewhere")) == []


@pytest.mark.parametrize(
    ("change", "kind", "name"),
    [
        (lambda: Path("model/config.json").write_text("what is in model/CONFIG.json"), MODEL, "config.json"),
        (lambda: Path("model/config.json").unlink(), MODEL, "config.json"),
        (lambda: Path("model/tokenizer.json").touch(), MODEL, "tokenizer.json"),
        (lambda: Path("text/b.txt").write_text("what is in text/B.txt"), "files of text", "b.txt"),
        (lambda: Path("text/b.txt").unlink(), "files of text", "b.txt"),
        (lambda: Path("text/c.txt").touch(), "files of text", "c.txt"),
        (lambda: Path("masks.safetensors").write_text("other masks"), "masks", "masks.safetensors"),
    ],
    ids=["model, same size", "model, gone", "model, new", "text, same size", "text, gone", "text, new", "masks"],
)
def test_a_file_that_is_another_new_or_gone_makes_another_run(
    here: Path, change: Callable[[], object], kind: str, name: str
) -> None:
    then = origin()
    change()
    assert changed_inputs(then, config()) == [f"{kind} are not the same ({name})"]


def test_what_is_not_there_any_more_at_all_or_was_not_recorded_is_not_compared(here: Path) -> None:
    then = origin()
    shutil.rmtree("text")
    shutil.rmtree("model")
    assert changed_inputs(then, config()) == []
    for damaged in ({}, {"model": 1, "text": [1], "seen": "x", "masks": {"a": None}}, {"model": {"files": {"a": 1}}}):
        assert changed_inputs(damaged, config()) == [] and other_code(damaged) == ""


def test_a_source_of_the_users_own_is_not_run_and_its_recorded_files_are_compared(here: Path) -> None:
    then = origin()
    own = config(_target_="own.Source")
    assert changed_inputs(then, own) == []
    Path("text/a.txt").write_text("other")
    assert changed_inputs(then, own) == ["files of text are not the same (a.txt)"]


def test_a_model_of_the_hub_is_compared_by_what_is_in_its_cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then, blob = origin(), Path("blobs") / hashed(Path("model/model.safetensors"))
    blob.parent.mkdir()
    blob.touch()  # by its name alone
    Path("snapshot").mkdir()
    Path("snapshot/model.safetensors").symlink_to(blob.absolute())
    monkeypatch.setattr(changed, "try_to_load_from_cache", lambda name, file, revision: cached.get(file))
    cached: dict[str, Any] = {"model.safetensors": "snapshot/model.safetensors", "config.json": object()}
    assert changed_inputs(then, config("org/name")) == []
    Path("snapshot/newer").touch()
    cached["model.safetensors"] = "snapshot/newer"  # the branch has moved on
    assert changed_inputs(then, config("org/name")) == ["files of the dense model are not the same (newer)"]


def test_other_versions_and_other_code_are_told_of(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then = origin()
    assert other_code(then) == ""
    assert other_code(then | {"code": "0" * 64}) == "other code of lit_recon"
    assert other_code(then | {"versions": {"lit_recon": "0.6.0", "torch": "2.0"}}) == "lit_recon 0.6.0, torch 2.0"
    own = Path("own_loss.py")
    own.write_text("a = 1")
    then |= {"modules": {"own_loss.loss": hashed(own)}, "module_files": {"own_loss.loss": str(own.absolute())}}
    then["seen"] |= seen([own])
    assert other_code(then) == ""
    own.write_text("a = 2")
    os.utime(own, ns=(1, 1))
    assert other_code(then) == "other code (own_loss.loss)"


def test_a_run_says_all_that_is_compared(run_once: Callable[..., Ended], model_folder: Path, text_file: Path) -> None:
    run_once()
    settings = yaml.safe_load(Path("run/config.yaml").read_text())
    one = Member("run", [], [], settings, named_by_time=False)
    Path("run/report.html").touch()
    assert standing(one) == Standing("done", Path("run"))
    results = json.loads(Path("run/results.json").read_text())
    assert {str(path) for path in (text_file, *model_folder.iterdir())} <= results["provenance"]["seen"].keys()
    results["versions"]["lit_recon"] = "0.6.0"
    Path("run/results.json").write_text(json.dumps(results))
    assert standing(one) == Standing("done", Path("run"), made_by="lit_recon 0.6.0")
    results["provenance"]["text"] = {str(text_file): "0" * 64}
    results["provenance"]["seen"] = {}
    Path("run/results.json").write_text(json.dumps(results))
    assert standing(one) == Standing("other", Path("run"), differs="files of text are not the same (words.txt)")
    began = time.process_time()
    for _ in range(12):
        origin = read_origin(Path("run"))
        assert changed_inputs(origin, settings) and other_code(origin)
    assert time.process_time() - began < 0.5, "a study starts at once"


def test_results_that_cannot_be_read_say_nothing(tmp_path: Path) -> None:
    assert read_origin(tmp_path) == {}
    (tmp_path / "results.json").write_text("[1")
    assert read_origin(tmp_path) == {}
