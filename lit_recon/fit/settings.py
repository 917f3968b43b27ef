"""Settings of the run itself, with their types; which settings are texts, or paths; and what this call gives.

Those of the parts (model, data, ...) have their types from the annotations of what they are given to (annotations.py).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_recon.fit.annotations import wrong_type
from lit_recon.system.command_line import Problems, concerning, shortened

CALL: dict[str, Any] = {
    "sparsity": float | list,
    "seed": int,
    "output_dir": str,
    "overwrite": bool,
    "plan": bool,
    "resume": str | None,
    "stop_after": int | None,
    "push": str | None,
    "memory_limit": str | int | None,
    "prune_by": str,
    "allow_unscored": bool,
    "walk": str,
    "keep": str,
    "patience": int | None,
    "start": str,
}
PATHS = ("output_dir", "resume", "experiment_dir", "data.paths", "data.evaluation_paths", "model.name")
TEXTS = (  # a number among these is a name: output_dir=2024, model.revision=5e10123
    *PATHS,
    "push",
    "model.revision",
    "model.transformers",
    "data.name",
    "data.config",
    "data.split",
    "data.field",
    "data.data_files",
)
_INNER = re.compile(r"data\.(evaluation|sources\.\w+)(?=\.)")  # sources of text within another, with settings like it


def is_text(setting: str) -> bool:
    """Whether a setting is a text, or a list of texts."""
    return _INNER.sub("data", setting) in TEXTS


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


def expand_home(cfg: DictConfig) -> None:
    """Replace "~" at the start of paths by the home folder: a shell does not after "=".

    Raises:
        ValueError: There is no such user.
    """
    sources = OmegaConf.select(cfg, "data.sources", throw_on_missing=False)
    inner = ["data.evaluation", *(f"data.sources.{name}" for name in sources or () if isinstance(sources, DictConfig))]
    for name in (*PATHS, *(f"{place}.{path}" for place in inner for path in ("paths", "evaluation_paths"))):
        value = OmegaConf.select(cfg, name, throw_on_missing=False)
        values = list(value) if OmegaConf.is_list(value) else [value]
        if any(isinstance(one, str) and one.startswith("~") for one in values):
            try:
                expanded = [str(Path(one).expanduser()) if isinstance(one, str) else one for one in values]
            except RuntimeError as error:
                raise ValueError(f"{name}={value}: {error}; give the folder's whole path.") from error
            OmegaConf.update(cfg, name, expanded if OmegaConf.is_list(value) else expanded[0])


def earlier_run(cfg: DictConfig) -> Path | None:
    """The folder of the run that is to be resumed, if one is.

    Raises:
        ValueError: `resume` is no path of a folder.
    """
    problems = Problems()
    problems.check(expand_home, cfg)
    resume = check_call(cfg, problems, only=("resume",)).get("resume")
    problems.raise_all()
    if resume is None:
        return None
    with concerning(f"resume={shortened(resume, 100)}"):
        Path(resume, "config.yaml").is_file()  # a name that is too long, a folder that cannot be entered
    return Path(resume)


def check_call(cfg: DictConfig, problems: Problems, *, only: Sequence[str] = tuple(CALL)) -> dict[str, Any]:
    """The settings of the run itself but for those that are missing or of a wrong type, which are added as problems."""
    found: dict[str, Any] = {}
    for name, hint in ((name, CALL[name]) for name in only):
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
        if name in PATHS and value == "":
            wrong.append(f"{name}='': expected the path of a folder.")
        for problem in wrong:
            problems.add(problem)
        if not wrong:
            found[name] = value
    return found
