"""What a run must have in common with the one it takes up, and that each difference is told in words."""

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from lit_recon.fit.signature import changes, code_files, differences

SIGNED: dict[str, Any] = {
    "config": {"seed": 0, "trainer": {"max_epochs": 1, "precision": "auto"}, "data": {"paths": ["a", "b"]}},
    "model": {"model.safetensors": "f00"},
    "model_config": {"rope_theta": 1e4},
    "compute": {"device": "cpu", "precision": "32-true"},
    "data": "ba4",
    "code": {"mine.Module": "c0de"},
    "versions": {"lit_recon": "0.1", "torch": "2.0"},
}


def test_the_code_of_a_run_is_the_package_the_named_files_and_what_they_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "helper.py").write_text("SHARE = 0.5\n")
    (tmp_path / "named.py").write_text("import helper\nfrom functools import partial\nloss = partial(print)\n")
    monkeypatch.syspath_prepend(tmp_path)
    targets = ["named.loss", "torch.optim.AdamW", "lit_recon.pruning.criteria.wanda.Wanda", "builtins.print"]
    found = code_files({str(index): {"_target_": target} for index, target in enumerate(targets)})
    assert {"named.loss", "helper", "lit_recon/pruning/masks.py", "lit_recon/fit/__main__.py"} <= found.keys()
    assert not [name for name in found if name.startswith(("torch", "numpy", "_pytest", "json", "lit_recon/report"))]
    assert "named.loss" in code_files({"callbacks": [{"_target_": "named.loss"}, "text"]})
    for name in ("named", "helper"):
        monkeypatch.delitem(sys.modules, name)


def changed(*keys: str, value: object) -> dict[str, Any]:
    """The signature with another value."""
    made = deepcopy(SIGNED)
    node = made
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    return made


def test_a_signature_that_went_through_json_is_the_same() -> None:
    assert changes(json.loads(json.dumps(SIGNED)), SIGNED) == []


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (("config", "seed"), 1, "seed was 0 and is 1"),
        (("config", "trainer", "max_epochs"), 2, "trainer.max_epochs was 1 and is 2"),
        (("config", "trainer", "new"), "x", "trainer.new was None and is 'x'"),
        (("code", "mine.Module"), "c0de2", "code has changed (mine.Module)"),
        (("config", "trainer"), None, "trainer was {'max_epochs': 1, 'precision': 'auto'} and is None"),
        (("config", "data", "paths"), ["a"], "data.paths was ['a', 'b'] and is ['a']"),
        (("model", "model.safetensors"), "f01", "files of the dense model are not the same (model.safetensors)"),
        (("model_config", "rope_theta"), 1e6, "the dense model's config.json: rope_theta was 10000.0 and is 1000000.0"),
        (("compute", "precision"), "bf16-mixed", "precision was '32-true' and is 'bf16-mixed'"),
        (("data",), "ba5", "the text gives other samples"),
        (("versions", "torch"), "2.1", "torch was 2.0 and is 2.1"),
        (("versions", "torch"), None, "torch was 2.0 and is None"),
    ],
)
def test_each_difference_is_told(keys: tuple[str, ...], value: object, told: str) -> None:
    assert changes(SIGNED, changed(*keys, value=value)) == [told]


def test_all_differences_are_told_at_once() -> None:
    now = {
        **changed("config", "seed", value=1),
        "model": {"model.safetensors": "other"},
        "data": "other",
        "versions": {},
    }
    assert len(changes(SIGNED, now)) == 5


def test_differences_are_those_of_the_deepest_settings_that_both_have() -> None:
    before = {"a": {"b": 1, "c": {"d": 2}}, "e": 3, "gone": {"f": 4}}
    now = {"a": {"b": 1, "c": {"d": 5}}, "e": 3, "new": None}
    assert list(differences(before, now)) == [("a.c.d", 2, 5), ("gone", {"f": 4}, None)]
    assert list(differences(before, before)) == []
    assert list(differences({"d": 2}, {"d": 3}, "a.c")) == [("a.c.d", 2, 3)]
