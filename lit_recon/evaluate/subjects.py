"""What checkpoint= and dense= name: the folder of a run, a model folder, an id of the Hub, a member of conf/model.

Of a run it is its checkpoint/ that is evaluated; its configuration says which model it pruned, and its masks which of
that model's weights went. The folder may be another person's, so that what its configuration names is looked at first.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lit_recon.model.loading import HubModel, LanguageModel
from lit_recon.model.named import model_named
from lit_recon.pruning.criteria import changes_weights
from lit_recon.settings.conf import members
from lit_recon.settings.trusted import check_trusted
from lit_recon.system.command_line import in_words

log = logging.getLogger(__name__)

CHECKPOINT, CONFIG, MASKS, RECORD = "checkpoint", "config.yaml", "masks.safetensors", "evaluations.json"
EVALUATIONS = Path("evaluations")  # records of models that have no folder here


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        name: As it was given.
        model: The model, before it is read.
        run: The folder of the run that made it, where one did.
        folder: The folder that it is in, or that of its run; None: of the Hub, or of wheels.
    """

    name: str
    model: LanguageModel
    run: Path | None = None
    folder: Path | None = None

    @property
    def record(self) -> Path:
        """The file that its evaluations are added to."""
        if self.folder is not None:
            return self.folder / RECORD
        return EVALUATIONS / f"{self.name.replace('/', '--')}.json"


def find_subject(setting: str, name: str) -> Subject:
    """What a setting names.

    Args:
        setting: "checkpoint" or "dense".
        name: Its value; <Hub id>@<revision> is a model of the Hub at a branch, tag or commit.

    Raises:
        ValueError: A folder that is neither a model nor a run.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ValueError(f"{setting}={name} is a file; give the folder of a run, or that of a model.")
    if folder.is_dir():
        return _in_folder(setting, name, folder)
    known = ", ".join(member for member in members("model") if member != "hf")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" not in name and name not in members("model")):
        raise ValueError(
            f"{setting}={name}: no such folder here; give the folder of a run, a model folder, a Hub id "
            f"('owner/name'), or one of {known}."
        )
    name_only, _, revision = name.partition("@")
    return Subject(name, model_named(name_only, revision=revision or None))


def _in_folder(setting: str, name: str, folder: Path) -> Subject:
    """A run, or a model folder, which may be that of a run."""
    if (folder / "config.json").is_file():
        run = folder.parent if folder.name == CHECKPOINT and (folder.parent / CONFIG).is_file() else None
        return Subject(name, HubModel(name=str(folder)), run, run or folder)
    if (folder / CHECKPOINT / "config.json").is_file():
        is_run = (folder / CONFIG).is_file()
        return Subject(name, HubModel(name=str(folder / CHECKPOINT)), folder if is_run else None, folder)
    if (folder / CONFIG).is_file():
        raise ValueError(f"{setting}={name}: that run has no checkpoint/ yet; resume it, or give another.")
    held = sorted(path.name for path in folder.iterdir())
    raise ValueError(
        f"{setting}={name}: neither a model (no config.json) nor a run (no checkpoint/); it holds "
        f"{', '.join(held[:6]) or 'nothing'}{', ...' if len(held) > 6 else ''}."
    )


def dense_of_run(subject: Subject) -> LanguageModel | None:
    """The model that a run has pruned; None, with a remark, where it cannot be found any more."""
    if subject.run is None:
        return None
    try:
        config = _config(subject.run)
        node = config.get("model")
        check_trusted(OmegaConf.create({"model": node}), f"checkpoint={subject.name}")
        model = instantiate(node, _convert_="all")
        if not isinstance(model, LanguageModel):
            raise ValueError(f"checkpoint={subject.name}: the model in its config.yaml is none")
        model.check()
        return model
    except Exception as error:  # whatever the configuration of a run can hold
        log.warning(
            "the dense model of %s cannot be read, and is left out (%s); dense=<model>", subject.run, in_words(error)
        )
        return None


def masks_of_run(subject: Subject) -> Path | None:
    """The masks of a run that left the other weights as they were; None where it has none, or changed the weights."""
    if subject.run is None or not (subject.run / MASKS).is_file():
        return None
    try:
        config = _config(subject.run)
        check_trusted(OmegaConf.create({"criterion": config.get("criterion")}), f"checkpoint={subject.name}")
        changes = changes_weights(instantiate(config.criterion, _convert_="all"))  # which its settings may decide
    except Exception as error:  # whatever the configuration of a run can hold
        log.warning(
            "what %s pruned by cannot be read, and the pruned model is left out (%s)", subject.run, in_words(error)
        )
        return None
    return None if changes else subject.run / MASKS


def _config(run: Path) -> DictConfig:
    config = OmegaConf.load(run / CONFIG)
    if not isinstance(config, DictConfig):
        raise ValueError(f"{run / CONFIG} holds no settings")
    return config
