"""Settings of a run itself, with their types; those that are texts, or paths; the run that a call resumes.

Those of the parts (model, data, ...) have their types from the annotations of what they are given to
(settings/annotations.py).
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lit_recon.settings import values
from lit_recon.settings.values import GROUP_PATHS, GROUP_TEXTS
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
OWN_PATHS = ("output_dir", "resume", "experiment_dir")
PATHS = (*OWN_PATHS, *GROUP_PATHS)
EXPRESSIONS = ("windows.match", "module.train")
TEXTS = (*OWN_PATHS, "push", *EXPRESSIONS, *GROUP_TEXTS)  # a number among these is a name: output_dir=2024


def is_text(setting: str) -> bool:
    """Whether a setting is a text, or a list of texts."""
    return values.is_text(setting, TEXTS)


def earlier_run(cfg: DictConfig) -> Path | None:
    """The folder of the run that is to be resumed, if one is.

    Raises:
        ValueError: `resume` is no path of a folder.
    """
    problems = Problems()
    problems.check(values.expand_home, cfg, PATHS)
    resume = values.check_call(cfg, problems, {"resume": CALL["resume"]}, paths=PATHS).get("resume")
    problems.raise_all()
    if resume is None:
        return None
    with concerning(f"resume={shortened(resume, 100)}"):
        Path(resume, "config.yaml").is_file()  # a name that is too long, a folder that cannot be entered
    return Path(resume)
