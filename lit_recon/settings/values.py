"""Values of a composed configuration: which are texts, or paths; what a command line gives; their types.

A number where a text is meant is a text (model.revision=5e10123), "~" opens a path, and a setting of a wrong type or of
no value is one message. A command hands in the names and types of its own settings (fit/settings.py).
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_recon.settings.annotations import wrong_type
from lit_recon.system.command_line import Problems, shortened

GROUP_PATHS = ("data.paths", "data.evaluation_paths", "model.name")  # of groups that several commands have
GROUP_TEXTS = (
    *GROUP_PATHS,
    "model.revision",
    "model.transformers",
    "data.name",
    "data.config",
    "data.split",
    "data.field",
    "data.data_files",
)
_INNER = re.compile(r"data\.(evaluation|sources\.\w+)(?=\.)")  # sources of text within another, with settings like it


def is_text(setting: str, names: Collection[str] = GROUP_TEXTS) -> bool:
    """Whether a setting is a text, or a list of texts: one of `names`, also in a source of text within another."""
    return _INNER.sub("data", setting) in names


def plain(node: Any) -> Any:
    """What a node of a configuration holds, as lists, dictionaries and values."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def texts(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every setting below a node that is a text, with its value."""
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        below = f"{name}.{key}" if name else str(key)
        if isinstance(value, str):
            yield below, value
        elif isinstance(value, (Mapping, list, tuple)):
            yield from texts(value, below)


def targets(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The dotted paths of classes and functions below a node, with the settings that give them."""
    return ((setting, path) for setting, path in texts(node, name) if setting.rpartition(".")[2] == "_target_")


def given() -> dict[str, str]:
    """The settings that the command line gives, each with its whole word."""
    words: Any = OmegaConf.to_container(HydraConfig.get().overrides, resolve=False)
    names = ((word.partition("=")[0].lstrip("+~").rpartition("@")[2], word) for word in words["task"])
    return dict(names)  # data@data.evaluation=files gives data.evaluation


def given_of(part: str) -> str:
    """The words of the command line that concern a part, or its name."""
    words = [word for name, word in given().items() if name == part or name.startswith(f"{part}.")]
    return shortened(" ".join(words), 200) or part


def expand_home(cfg: DictConfig, paths: Sequence[str] = GROUP_PATHS) -> None:
    """Replace "~" at the start of paths by the home folder: a shell does not after "=".

    Args:
        cfg: The composed configuration.
        paths: Settings that are paths, or lists of them.

    Raises:
        ValueError: There is no such user.
    """
    sources = OmegaConf.select(cfg, "data.sources", throw_on_missing=False)
    inner = ["data.evaluation", *(f"data.sources.{name}" for name in sources or () if isinstance(sources, DictConfig))]
    for name in (*paths, *(f"{place}.{path}" for place in inner for path in ("paths", "evaluation_paths"))):
        value = OmegaConf.select(cfg, name, throw_on_missing=False)
        values = list(value) if OmegaConf.is_list(value) else [value]
        if any(isinstance(one, str) and one.startswith("~") for one in values):
            try:
                expanded = [str(Path(one).expanduser()) if isinstance(one, str) else one for one in values]
            except RuntimeError as error:
                raise ValueError(f"{name}={value}: {error}; give the folder's whole path.") from error
            OmegaConf.update(cfg, name, expanded if OmegaConf.is_list(value) else expanded[0])


def check_call(
    cfg: DictConfig, problems: Problems, types: Mapping[str, Any], *, paths: Collection[str] = ()
) -> dict[str, Any]:
    """The settings of a call itself but for those that are missing or of a wrong type, which are added as problems.

    Args:
        cfg: The composed configuration.
        problems: Takes what is wrong.
        types: The settings, each with its type.
        paths: Those that are paths, which no empty text is.
    """
    found: dict[str, Any] = {}
    for name, hint in types.items():
        if name not in cfg.keys():  # also one of no value
            problems.add(f"{name}: a run needs it; leave ~{name} out.")
            continue
        try:
            value = plain(cfg[name])
        except OmegaConfBaseException as error:
            said = "has no value; give" if OmegaConf.is_missing(cfg, name) else f"{str(error).splitlines()[0]}; give"
            problems.add(f"{name}: {said} {name}=<value>.")
            continue
        wrong = list(wrong_type(name, value, hint))
        if name in paths and value == "":
            wrong.append(f"{name}='': expected the path of a folder.")
        for problem in wrong:
            problems.add(problem)
        if not wrong:
            found[name] = value
    return found
