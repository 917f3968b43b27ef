"""Trust in the configuration of an earlier run, whose folder may be another person's: what of it runs in this process.

Of what it names, only classes of lit_recon, Lightning, torch and transformers and files of the user's own working
directory run; what the command line names itself runs as always.
"""

import inspect
import sys
from collections.abc import Collection
from pathlib import Path

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from lit_recon.settings.values import targets

CLASSES = ("lit_recon", "lightning", "torch.optim", "torch.nn", "transformers")  # by where they are defined
FUNCTIONS = ("lit_recon.modules", "torch.optim", "torch.nn.functional", "torch._C._nn", "transformers.optimization")


def check_trusted(config: DictConfig, about: str, *, trusted: Collection[str] = ()) -> None:
    """Check that what a run's configuration names may run in this process.

    Args:
        config: The configuration.
        about: The setting that led to it, such as "resume=<folder>".
        trusted: What the command line, or lit_recon's own configuration, names as well.

    Raises:
        ValueError: It names something else than is expected of a run.
    """
    for setting, target in targets(OmegaConf.to_container(config)):
        if target not in trusted and not _is_expected(target):
            raise ValueError(
                f"{about}: its configuration names {setting}={target}, which is neither a class of lit_recon, "
                "Lightning, torch.optim or torch.nn nor a file of the working directory, and is not run. If you trust "
                f"it, give {setting}={target} as well."
            )


def _is_expected(target: str) -> bool:
    """Whether a dotted path leads to a class or function of the working directory, or of a known module.

    What counts is where it is defined: by way of what a module imports, a path leads anywhere.
    """
    top, here = target.partition(".")[0], Path.cwd()
    if not ((here / top).is_dir() or (here / f"{top}.py").is_file() or target.startswith(CLASSES)):
        return False  # before it is imported
    try:
        found = get_object(target)
    except Exception:  # told of with the other settings
        return True
    defined = getattr(found, "__module__", None) or ""
    file = Path(getattr(sys.modules.get(defined), "__file__", None) or here)
    if here in file.absolute().parents and "site-packages" not in file.parts:
        return defined.partition(".")[0] not in sys.stdlib_module_names
    return any(f"{defined}.".startswith(f"{name}.") for name in (CLASSES if inspect.isclass(found) else FUNCTIONS))
