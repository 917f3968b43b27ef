"""The model card has the Hub's metadata in YAML that holds any name, and the checkpoint needs nothing of ours."""

import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import markdown
import pytest
import yaml
from conftest import Ended

from lit_recon.data.hub import Hub
from lit_recon.data.mixture import Mixture
from lit_recon.data.python_docs import PythonDocs
from lit_recon.fit.output.card import card_metadata, model_card
from lit_recon.model.loading import HubModel

PLAN: Any = SimpleNamespace(parameters=200, prunable=100, windows=2)
COMMIT = "0123456789" * 4


def metadata(card: str) -> dict[str, Any]:
    """What the Hub reads of a card."""
    _, block, _ = card.split("---\n", 2)
    return yaml.safe_load(block)


def base(folder: Path, card: str | None = None, header: dict | None = None) -> HubModel:
    """A model in a folder, of which only that it is there counts."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    if card is not None:
        (folder / "README.md").write_text(card)
    if header is not None:
        (folder / "gguf.json").write_text(json.dumps(header))
    return HubModel(name=str(folder))


def test_licence_language_and_task_are_those_of_the_dense_models_card(tmp_path: Path) -> None:
    theirs = "license: other\nlicense_name: own\nlanguage: [de, en]\npipeline_tag: image-text-to-text\nwidget: x\n"
    theirs = f"---\n{theirs}---\n# Model\n"
    found = card_metadata(base(tmp_path / "a", theirs), ["allenai/c4"]).to_dict()
    assert found["license"] == "other" and found["license_name"] == "own" and found["language"] == ["de", "en"]
    assert found["pipeline_tag"] == "image-text-to-text" and found["library_name"] == "transformers"
    assert found["datasets"] == ["allenai/c4"] and {"pruning", "sparse"} <= {*found["tags"]}
    assert "widget" not in found and "base_model" not in found, "a folder is no model of the Hub"


CARDS = [None, "no metadata", "---\n- a list\n---\n", "---\nlicense: [\n---\n", "---\nlicense: no\n---\n"]


@pytest.mark.parametrize("card", CARDS)
def test_a_card_that_says_nothing_leaves_the_licence_out(tmp_path: Path, card: str | None) -> None:
    found = card_metadata(base(tmp_path / "a", card), []).to_dict()
    assert "license" not in found and "datasets" not in found and found["pipeline_tag"] == "text-generation"


def test_a_dequantised_model_has_the_licence_that_its_file_gave(tmp_path: Path) -> None:
    assert card_metadata(base(tmp_path / "a", header={"general.license": "gemma"}), []).license == "gemma"
    assert card_metadata(base(tmp_path / "b", header={"general.license": 3}), []).license is None


def test_a_model_in_the_hubs_cache_is_the_base_model_by_its_id(tmp_path: Path) -> None:
    cached = base(tmp_path / "models--owner--tiny-model" / "snapshots" / COMMIT)
    found = card_metadata(cached, []).to_dict()
    assert found["base_model"] == "owner/tiny-model" and found["base_model_relation"] == "finetune"


ODD = [
    *("a: b #c", "- [x]", "caf\udce9", "<script>alert(1)</script>", "a | b\n---\nc", "no", "&lt;b&gt;"),
    *("`x` *y* [z](http://a) ![i](http://b)", "__a__ \\<b>", "'\"{{ x }}"),
]


@pytest.mark.parametrize("name", ODD)
def test_any_name_gives_yaml_and_no_markup(name: str, tmp_path: Path) -> None:
    about = card_metadata(base(tmp_path / "a"), [name])
    card = model_card(name, {"criterion": name}, PLAN, [], metadata=about)
    shown = " ".join(name.encode(errors="backslashreplace").decode().split())
    assert metadata(card)["datasets"] == [shown]
    (row,) = [line for line in card.splitlines() if line.startswith("| criterion |")]
    page = markdown.markdown(f"| | |\n|---|---|\n{row}", extensions=["tables"])
    cells = [text for text in re.split(r"</?t[dhr]>|\n", page.partition("<tbody>")[2].partition("</tbody>")[0]) if text]
    assert cells == ["criterion", html.escape(shown, quote=False)]


def test_data_sets_of_the_hub_are_named_where_samples_are_taken_of_them(tmp_path: Path) -> None:
    assert Hub(name=str(tmp_path)).hub_datasets() == PythonDocs().hub_datasets() == []
    sources = {"a": Hub(name="o/a"), "b": PythonDocs(), "c": Hub(name="o/c")}
    mixed = Mixture(sources=sources, weights={"a": 1, "b": 1, "c": 0}, evaluation=Hub(name="o/d"))
    assert mixed.hub_datasets() == ["o/a"]


def test_a_run_leaves_a_card_and_a_checkpoint_that_transformers_alone_loads(run_once: Callable[..., Ended]) -> None:
    run_once()
    read = metadata(Path("run/checkpoint/README.md").read_text())
    assert read["library_name"] == "transformers" and read["pipeline_tag"] == "text-generation"
    script = """
import sys

class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("lit_recon", "lightning", "hydra"):
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Blocker())
from transformers import AutoModelForCausalLM, AutoTokenizer
model, said = AutoModelForCausalLM.from_pretrained("run/checkpoint", output_loading_info=True)
assert not any(said.values()), said
tokens = AutoTokenizer.from_pretrained("run/checkpoint")("some text", return_tensors="pt").input_ids
assert model(tokens).logits.isfinite().all()
assert (model.model.layers[0].mlp.up_proj.weight == 0).float().mean() > 0.4
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
