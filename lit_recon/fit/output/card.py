"""Model card of a checkpoint, README.md: how it was made and how to read it, with the metadata that the Hub reads.

The metadata is YAML between two lines of dashes (https://huggingface.co/docs/hub/model-cards): base model, licence and
languages are those of the dense model's own card, where there is one.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, hf_hub_download, metadata_load
from huggingface_hub.errors import HTTPError
from yaml import YAMLError

from lit_recon import __version__
from lit_recon.fit.plan.estimate import Plan
from lit_recon.model.gguf import license_of
from lit_recon.model.loading import HubModel, LanguageModel
from lit_recon.reconstruction.window_result import WindowResult
from lit_recon.system.markdown import as_markdown, one_line

TAGS = ["lit_recon", "pruning", "sparse", "local-reconstruction", "arxiv:2510.14444"]
PLACE = "checkpoint"  # where the code of a card finds the model, before it is on the Hub
_FROM_BASE = ("license", "license_name", "license_link", "language", "pipeline_tag")
_IN_CACHE = re.compile(r"/models--([^/]+)/snapshots/[0-9a-f]{40}$")
HOW = {  # of a walk: how a model is made, for its card
    "local": "reconstructed one window at a time to match the dense model's activations",
    "global": "retrained, all layers at once",
    "local_then_global": "reconstructed one window at a time to match the dense model's activations and retrained, all "
    "layers at once",
}


def card_metadata(model: LanguageModel, datasets: Sequence[str]) -> ModelCardData:
    """Metadata of a pruned model's card.

    Args:
        model: The dense model; what its own card says is read, from the Hub where that answers.
        datasets: Hub ids of the data sets that it is calibrated on.
    """
    folder = model.files()[0].parent
    base = _base_card(model, folder)
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": TAGS}
    found |= {name: _plain(base[name]) for name in _FROM_BASE if _is_text(base.get(name))}
    base_model = _hub_id(model, folder)
    return ModelCardData(
        **found,
        base_model=base_model and one_line(base_model),
        base_model_relation="finetune" if base_model else None,  # of those that the Hub knows, the nearest
        datasets=[one_line(name) for name in datasets] or None,
    )


def model_card(
    model: str,
    recipe: Mapping[str, str],
    plan: Plan,
    windows: Sequence[WindowResult],
    auto_class: str = "AutoModelForCausalLM",
    metadata: ModelCardData | None = None,
) -> str:
    """README.md of the checkpoint.

    Args:
        model: The dense model's name.
        recipe: How it was made, in the words of the settings.
        plan: Counts parameters and windows.
        windows: Results of those that are done.
        auto_class: The class of transformers that reads it.
        metadata: Of the card; None: without anything from the dense model.
    """
    accepted = sum(window.accepted for window in windows)
    rows = "\n".join(f"| {as_markdown(key)} | {as_markdown(value)} |" for key, value in recipe.items())
    left = plan.windows - len(windows)
    unfinished = f"| unfinished | {len(windows)} of {plan.windows} windows done, the rest is dense |\n" if left else ""
    made = HOW[recipe.get("walk", "local")]
    about = metadata or ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=TAGS)
    return f"""---
{about.to_yaml()}
---
# {as_markdown(model)}, pruned and reconstructed

Made with lit_recon {__version__}: pruned, then {made}
(Wagner, Roux, Zimmer, Pokutta: "A Free Lunch in LLM Compression", arXiv 2510.14444). Pruned weights are exact zeros.

| | |
|---|---|
| dense model | {as_markdown(model)} |
{rows}
| prunable | {plan.prunable / plan.parameters:.1%} of all parameters |
| windows reconstructed | {accepted} of {len(windows)} |
{unfinished}
```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{PLACE}")
tokenizer = AutoTokenizer.from_pretrained("{PLACE}")
```
"""


def _base_card(model: LanguageModel, folder: Path) -> dict[str, Any]:
    """Metadata of the dense model's own card; empty without one that can be read."""
    path = folder / "README.md"
    # Without the Hub, without a card, or with one that is no card: the licence is not known then.
    with suppress(OSError, ValueError, HTTPError, YAMLError):
        if isinstance(model, HubModel) and not Path(model.name).expanduser().is_dir():
            path = Path(hf_hub_download(model.name, "README.md", revision=model.revision))
        return metadata_load(path) or {}
    found = license_of(folder)
    return {} if found is None else {"license": found}


def _hub_id(model: LanguageModel, folder: Path) -> str | None:
    """The dense model's id, where it is of the Hub, also by way of the folder in which the Hub's cache keeps it."""
    if cached := _IN_CACHE.search(folder.absolute().as_posix()):
        return cached[1].replace("--", "/")
    return model.name if isinstance(model, HubModel) and not Path(model.name).expanduser().is_dir() else None


def _is_text(value: Any) -> bool:
    """Whether a value of a card is a text, or a list of some: YAML reads the language Norwegian, no, as false."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, str) and one for one in values)


def _plain(value: str | list[str]) -> str | list[str]:
    """Texts in one line each, which YAML can hold."""
    return [one_line(one) for one in value] if isinstance(value, list) else one_line(value)
