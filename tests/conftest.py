"""Tiny random models, what is trained of them, and a command line that runs in this process. No network."""

import gc
import json
import logging
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from launcher import Ended, Launcher, compose_once
from lightning import LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_recon.activations.chain import Chain
from lit_recon.activations.datamodule import Activations
from lit_recon.activations.passes import Passes
from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import Store
from lit_recon.data.packing import PADDING
from lit_recon.fit import __main__ as fit
from lit_recon.model.architectures import SHAPES, VOCABULARY, tiny_model
from lit_recon.model.decoder import Decoder
from lit_recon.model.partition import partition
from lit_recon.model.windows import AnyWindow, Window
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner, prune
from lit_recon.reconstruction.tensorboard import RunLogger
from lit_recon.reconstruction.window_fit import WindowFitter
from lit_recon.settings.conf import CONF
from lit_recon.system.device import Compute

os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side; threads that wait for each other are slow
torch.set_num_threads(1)
compose_once()
CPU = Compute(torch.device("cpu"), "32-true")
KINDS = (
    "llama",  # sequential halves, rotary positions
    "gemma2",  # layers that differ: every second one attends to a window of 8 tokens
    "gpt2",  # Conv1D matrices, stored (inputs, outputs)
    "gpt_neox",  # parallel halves
    "opt",  # dropout in its default configuration
    "bloom",  # positions as a bias that the model hands to each layer
    "mixtral",  # experts in one parameter, and a router
)
# Shapes that take other paths through lit_recon; those of the others are among these.
UNLIKE = (
    "llama",  # sequential halves, rotary positions
    "gpt2",  # Conv1D, learned positions
    "gpt_neox",  # parallel halves
    "phi",  # parallel halves that share a norm
    "gemma3",  # sliding windows in every second layer, norms behind each side
    "bloom",  # positions as a bias; halves refused, as the residual goes into its MLP
    "opt_post_norm",  # projections beside the layers; halves refused, as norms follow the residual
    "mixtral",  # experts in one parameter
    "gpt_oss",  # experts stored the other way round, with biases
    "deepseek_v3",  # low-rank attention; one layer without experts
    "llama4",  # every expert is given every token; layers with and without experts in turn
)
PADDED = ("llama", "gemma2", "bloom", "opt", "mixtral", "gpt_oss", "llama4")  # unlike masks
LENGTHS = [24, 9, 17, 24, 5]  # of padded samples
EVERY_SHAPE = [pytest.param(shape, marks=() if shape in UNLIKE else pytest.mark.slow) for shape in SHAPES]
Masks = Mapping[str, Tensor]
TIMES = (
    "seconds",
    "peak_memory_bytes",
    "walk_peak_memory_bytes",
    "walk_peak_host_bytes",
    "phase_peak_memory_bytes",
    "predicted",
)  # of results.json


def pairs(rows: Iterable, columns: Sequence, whole_rows: Sequence, whole_columns: Sequence) -> list:
    """All pairs, as parameters; slow are those in none of the rows and columns that shall be tested as a whole."""
    return [
        pytest.param(row, column, marks=() if row in whole_rows or column in whole_columns else pytest.mark.slow)
        for row in rows
        for column in columns
    ]


def title(value: str | Iterable[str]) -> str:
    """Of a parameter that is a word or several."""
    return value if isinstance(value, str) else " ".join(value)


def pytest_collection_finish() -> None:
    """Let no collection of garbage look at what imports made."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each tiny model in turn."""
    return tiny_model(request.param)


@pytest.fixture
def tokens_ST() -> torch.Tensor:
    """Random tokens, longer than the tiny sliding window."""
    return torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens_BT() -> Tensor:
    """A batch of three, longer than the tiny sliding windows."""
    return torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padded_ST() -> Tensor:
    """Samples of different lengths, two of them full."""
    tokens_ST = torch.randint(3, VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(1))
    return tokens_ST.where(torch.arange(24) < torch.tensor(LENGTHS)[:, None], PADDING)


@cache
def model_of(shape: str) -> PreTrainedModel:
    """A tiny model that no test changes."""
    return tiny_model(shape)


def chain_of(
    model: PreTrainedModel,
    tokens_ST: Tensor,
    num_samples: int,
    batch_size: int = 2,
    propagation: Propagation | None = None,
    *,
    store: Store | None = None,
    recompute: bool = False,
) -> Chain:
    """A chain at the model's first layer, on the CPU in float32."""
    decoder = Decoder(model, CPU.device)
    passes = Passes(decoder, tokens_ST, num_samples=num_samples, batch_size=batch_size, compute=CPU, store=store)
    return Chain(passes, propagation or Propagation(inputs="dense"), recompute=recompute)


def assert_close(values: Tensor, expected: Tensor, what: str = "values") -> None:
    """Equal but for the order of sums."""
    assert values.shape == expected.shape, f"{what}: {values.shape}, expected {expected.shape}"
    worst = (values - expected).abs().max() / expected.abs().max()
    assert worst <= 1e-5, f"{what}: off by {worst:.1e}"


def masks_of(pruner: Pruner, window: Window) -> dict[str, Tensor]:
    """The masks of a window, in the steps in which the walk makes them."""
    pruner.begin(window)
    statistics = pruner.statistics(window)
    pruner.chain.dense_pass(window, [statistics])
    return pruner.decide(window, statistics).masks


def pruned_window(model: PreTrainedModel, tokens_ST: Tensor, num_samples: int = 4) -> tuple[Activations, Window, Masks]:
    """The model's first layer, half of its weights zeroed, with its inputs and dense targets."""
    chain = chain_of(model, tokens_ST, num_samples)
    window = partition(model)[0]
    masks = masks_of(Pruner(Magnitude(), Unstructured(sparsity=0.5), chain), window)
    prune(window, masks)
    return Activations.from_chain(chain), window, masks


def trainer(**settings: object) -> Callable[..., Trainer]:
    """The Trainer of the real configuration, on the CPU in float32."""
    settings = {"accelerator": "cpu", "precision": "32-true"} | settings
    return instantiate(OmegaConf.load(CONF / "fit.yaml").trainer, **settings)


@cache
def configuration(*overrides: str) -> DictConfig:
    """The real configuration."""
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return compose("fit", overrides=list(overrides))


def module(lr: float = 1e-2, **settings: object) -> Callable[..., LightningModule]:
    """The module of the real configuration; `settings` replace its arguments, `cls` itself."""
    made = instantiate(configuration().module, _convert_="all")
    made.keywords.pop("retry_rates")  # of the fit
    optimizer = partial(made.keywords["optimizer"], lr=lr)
    return partial(settings.pop("cls", made.func), **made.keywords | {"optimizer": optimizer} | settings)


def fitter(run: Path, make: Callable[..., LightningModule], **settings: object) -> WindowFitter:
    """A WindowFitter as a run makes it, with four epochs unless `settings` of the Trainer say otherwise."""
    settings = {"max_epochs": 4} | settings
    return WindowFitter(make, trainer(**settings), logger=RunLogger(run), device=CPU.device, seed=0)


def weights(window: AnyWindow) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in window.named_parameters()}


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token per lower-case letter, digit or blank."""
    letters = "_ abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-\n"
    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="_")


def telling_tokenizer() -> PreTrainedTokenizerFast:
    """The same with tokens that start a text and end it, neither of which it puts there itself."""
    tokenizer = letter_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer


@contextmanager
def mounted(disk: Path, size: str) -> Iterator[Path]:
    """A file system of its own at `disk`, as large as tmpfs is told, such as "1m"."""
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def unmappable(source: Path, folder: Path) -> Path:
    """A copy of a model with its weights in a file that cannot be mapped, so that they are in memory as a whole."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="session")
def unmappable_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in a file that cannot be mapped."""
    return unmappable(model_folder, tmp_path_factory.mktemp("unmappable") / "model")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs of random words, the same in every run."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(60)))
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of complete runs come first: what takes longest must not be left to one process at the end."""
    items.sort(key=lambda item: (item.path.parent.name != "runs", item.path.name != "test_kill.py"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees or fills the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LIT_RECON_CACHE", str(folder))
    return folder


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ended]]:
    """`python -m lit_recon.fit` with these arguments, in this process and an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # python -m has the working directory there
    gc.collect()
    gc.freeze()  # a run collects six times, and unfreezes
    monkeypatch.setattr(gc, "unfreeze", lambda: None)

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["fit", *arguments])
        capfd.readouterr()
        try:
            fit.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return Ended(status, *capfd.readouterr())

    handlers, before = logging.root.handlers[:], set(sys.modules)
    yield run
    logging.root.handlers = handlers
    for name in set(sys.modules) - before:  # a file of the test's own
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def cpu_seconds(*arguments: str) -> float:
    """Seconds of work that Python has with these arguments, the least of three times; others' work is not in it."""
    root, least = str(Path(__file__).parents[1]), math.inf
    for _ in range(3):
        process = subprocess.Popen([sys.executable, *arguments], cwd=root, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        least = min(least, usage.ru_utime + usage.ru_stime)
    return least


def numbers(run: Path) -> dict:
    """results.json without what is different each time, and without where the inputs lie."""
    results = json.loads((run / "results.json").read_text())
    for window in results["windows"]:
        window.pop("seconds")
    return {key: value for key, value in results.items() if key not in (*TIMES, "compute", "provenance")}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tiny_settings(model_folder: Path, text_file: Path) -> list[str]:
    """What shrinks the real configuration to a tiny model."""
    return [
        "model=hf",
        f"model.name={model_folder}",
        "data=files",
        f"data.paths=[{text_file}]",
        "data.num_samples=8",
        "data.length=32",
        "data.num_held_out=4",
        "data.evaluation_samples=4",
        "data.evaluation_length=32",
        "module.optimizer.lr=1e-2",
        "output_dir=run",
    ]


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts runs as processes of their own."""
    made = Launcher(tmp_path_factory.mktemp("said"))
    yield made
    made.close()


@pytest.fixture
def drawn() -> None:
    """The runs of this test draw their report, which takes as long as all else that a tiny run does."""


@pytest.fixture
def tiny_run(
    command: Callable[..., Ended],
    model_folder: Path,
    text_file: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Ended]:
    """The real configuration, shrunk to the tiny model; the report is drawn for tests that use `drawn`."""
    settings = tiny_settings(model_folder, text_file)
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("lit_recon.fit.output.folder.write_report", lambda folder: None)

    def run(*overrides: str) -> Ended:
        chosen = {override.partition("=")[0] for override in overrides}
        own = {"data": f"data.paths=[{text_file}]", "model": f"model.name={model_folder}"}  # of one member only
        dropped = {setting for group, setting in own.items() if group in chosen}
        if {"module=least_squares", "module=none"} & set(overrides):
            dropped.add("module.optimizer.lr=1e-2")
        return command(*(setting for setting in settings if setting not in dropped), *overrides)

    return run


@pytest.fixture(scope="session")
def kept_runs() -> dict[tuple[str, ...], tuple[Ended, Path]]:
    """Runs that `run_once` has made, by their overrides."""
    return {}


@pytest.fixture
def run_once(
    tiny_run: Callable[..., Ended],
    kept_runs: dict[tuple[str, ...], tuple[Ended, Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Ended]:
    """`tiny_run` without a report, made once for all tests that ask for the same; each has a copy in `run`."""

    def run(*overrides: str) -> Ended:
        shutil.rmtree("run", ignore_errors=True)
        if overrides not in kept_runs:
            ended = tiny_run(*overrides)
            assert ended.status == 0, ended.err
            kept_runs[overrides] = ended, tmp_path_factory.mktemp("kept") / "run"
            shutil.copytree("run", kept_runs[overrides][1])
        else:
            shutil.copytree(kept_runs[overrides][1], "run")
        return kept_runs[overrides][0]

    return run
