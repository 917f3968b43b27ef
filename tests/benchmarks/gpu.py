"""Speed and memory of runs on one GPU: python tests/benchmarks/gpu.py (eight minutes on an H100; --tiny: on a CPU).

Random bf16 models in the shapes of Llama 2 7B (4 of its layers), Llama 2 70B (2) and SmolLM2-135M are written to a
temporary folder and walked over by the command, Wanda at 50%, 128 samples of 2048 random letters, in blocks and in
halves. Of each run, from its results.json: seconds per window by phase, the fit's share of the rate that one large
product reaches in the same minute, peaks of memory against the plan's, and hours for all layers of the real model.

    FLOPs of a layer's fit = epochs (6 parameters tokens + 6 samples T^2 A)    A: features of all heads; causal, so half

Nothing is needed from outside. At the end come the tests that need a GPU (pytest -m gpu).
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

LETTERS = "_ abcdefghijklmnopqrstuvwxyz"
WALK = ("teacher", "prune", "fit", "advance", "commit")
KINDS = ("block", "half")
BUDGET = 480  # seconds of it all
FOR_TESTS = 90  # of these; no run starts after what is left of them
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Shape:
    """A model: how many layers are made of it, how many the real one has, and the batch it is trained in."""

    name: str
    layers: int
    depth: int
    batch_size: int
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Parameters of the matrices of one layer."""
        hidden, wide, heads = (self.config[f"{name}"] for name in ("hidden_size", "intermediate_size", "heads"))
        share = self.config["groups"] / heads
        return round(hidden * hidden * (2 + 2 * share)) + 3 * hidden * wide


@dataclass(frozen=True)
class Data:
    """How much text: calibration samples, held-out ones, tokens of each."""

    samples: int = 128
    held_out: int = 8
    length: int = 2048


def shape(name: str, layers: int, depth: int, batch_size: int, *sizes: int, tied: bool = False) -> Shape:
    """A Llama of these sizes: vocabulary, hidden size, MLP, heads, heads of keys and values."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "heads", "groups")
    return Shape(name, layers, depth, batch_size, dict(zip(names, sizes, strict=True)) | {"tied": tied})


SHAPES = (
    shape("Llama 2 7B", 4, 32, 2, 32000, 4096, 11008, 32, 32),
    shape("Llama 2 70B", 2, 80, 2, 32000, 8192, 28672, 64, 8),
    shape("SmolLM2-135M", 30, 30, 8, 49152, 576, 1536, 9, 3, tied=True),
)
TINY = (shape("tiny", 2, 4, 2, 64, 64, 128, 4, 2),)


def tensors_of(made: Shape) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Files of a model's random weights, a layer at a time."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration(made))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    files: dict[str, list[str]] = {}
    for name in model.state_dict():
        if not (made.config["tied"] and name == "lm_head.weight"):
            files.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    for index, names in files.items():
        found = {}
        for name in names:
            size = model.state_dict()[name].shape
            one = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator, device=device) * 0.02
            found[name] = one.bfloat16().cpu()
        yield f"model-{index}.safetensors", found


def configuration(made: Shape) -> LlamaConfig:
    """The configuration of a model."""
    sizes = made.config
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=made.layers,
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["groups"],
        max_position_embeddings=4096,
        tie_word_embeddings=sizes["tied"],
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def write_model(made: Shape, folder: Path) -> None:
    """Write a model and its tokenizer, a token per letter."""
    configuration(made).save_pretrained(folder)
    weight_map = {}
    for file, tensors in tensors_of(made):
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(LETTERS)}, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="_").save_pretrained(folder)


def write_text(path: Path, data: Data) -> None:
    """Write random letters, more than are needed."""
    draw, count = random.Random(0), 4 * (data.samples + data.held_out) + 40
    path.write_text("\n\n".join("".join(draw.choices(LETTERS[1:], k=max(600, data.length))) for _ in range(count)))


def peak_rate() -> float:
    """Products per second (FLOP/s) of one large product in bf16, the best of some."""
    on_gpu = torch.cuda.is_available()
    device, size = ("cuda", 8192) if on_gpu else ("cpu", 512)
    one = torch.randn(size, size, device=device).bfloat16()
    best = 0.0
    for _ in range(20 if on_gpu else 3):
        start = time.perf_counter()
        one @ one
        if on_gpu:
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def walk(made: Shape, kind: str, data: Data, folder: Path, limit: float) -> dict[str, Any] | str:
    """The results of a run over a model, or why there are none."""
    run = folder / "run"
    settings = [
        "model=hf",
        f"model.name={folder / 'model'}",
        "data=files",
        f"data.paths=[{folder / 'text.txt'}]",
        f"data.num_samples={data.samples}",
        f"data.num_held_out={data.held_out}",
        f"data.length={data.length}",
        f"data.batch_size={made.batch_size}",
        "data.evaluation_samples=4",
        f"data.evaluation_length={data.length}",
        "chain.inputs=dense",
        "module.optimizer.lr=1e-4",
        f"windows={kind}",
        f"output_dir={run}",
    ]
    shutil.rmtree(run, ignore_errors=True)
    environment = os.environ | {"LIT_RECON_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lit_recon.fit", *settings]
    try:
        ended = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    if ended.returncode:
        return f"ended with {ended.returncode}: {ended.stderr[-2000:]}"
    return json.loads((run / "results.json").read_text())


def flops_per_layer(made: Shape, data: Data) -> float:
    """Of one epoch of a layer's fit, its attention included."""
    tokens = data.samples * data.length
    return 6 * made.parameters * tokens + 6 * data.samples * data.length**2 * made.config["hidden_size"]


def describe(made: Shape, kind: str, data: Data, results: dict[str, Any], peak: float) -> list[str]:
    """Lines of a table about a run."""
    windows, seconds = results["windows"], results["seconds"]
    of_walk = sum(seconds[phase] for phase in WALK)
    per_layer = len(windows) // made.layers
    later = windows[per_layer:] or windows  # the first layer's pay for set-up
    fit = sum(window["seconds"] for window in later) / len(later) * per_layer
    fits = data.samples * data.length / fit
    besides = of_walk / seconds["fit"] - 1
    by_phase = " ".join(f"{phase} {seconds[phase] / len(windows):.2f}" for phase in WALK)
    hours = of_walk / made.layers * made.depth / 3600
    memory = [f"device {in_gb(results, 'walk_peak_memory_bytes')}"]
    if results.get("walk_peak_host_bytes"):
        memory.append(f"host {in_gb(results, 'walk_peak_host_bytes')}")
    return [
        f"{made.name}, {made.layers} of {made.depth} layers, windows={kind}, {len(windows)} windows, "
        f"batches of {made.batch_size}",
        f"  s per window   {by_phase}; all {of_walk / len(windows):.2f}",
        f"  fit            {flops_per_layer(made, data) / fit / peak:.0%} of the measured peak, {fits:.0f} tokens/s; "
        f"all else {besides:.0%} of its time",
        f"  load, evaluate {seconds['load']:.1f} s, {seconds['evaluate']:.1f} s; whole run {seconds['total']:.1f} s",
        f"  peak memory    {'; '.join(memory)}",
        f"  all layers     {hours:.3f} h ({hours * 3600:.0f} s)",
    ]


def in_gb(results: dict[str, Any], name: str) -> str:
    """A peak, and what the plan said of it."""
    measured, predicted = results[name], results["predicted"][name]
    return f"{measured / 1e9:.2f} GB, predicted {predicted / 1e9:.2f} ({predicted / max(1, measured) - 1:+.0%})"


def main(arguments: list[str] | None = None) -> int:
    """Make the table, then run the tests; the exit status is not 0 if a run or a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, as a test of this script; no tests after it")
    parser.add_argument("--only", help="models whose name contains this")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    chosen = parser.parse_args(arguments)
    began, failed = time.perf_counter(), 0
    if not (chosen.tiny or torch.cuda.is_available()):
        parser.error("no CUDA device; --tiny runs on a CPU")
    data = Data(8, 2, 32) if chosen.tiny else Data()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = peak_rate()
    print(f"{card}, torch {torch.__version__}, transformers {transformers.__version__}; bf16 {peak / 1e12:.2f} TFLOP/s")
    for made in TINY if chosen.tiny else SHAPES:
        if chosen.only and chosen.only not in made.name:
            continue
        with tempfile.TemporaryDirectory(prefix="lit_recon.gpu.") as place:
            folder = Path(place)
            write_model(made, folder / "model")
            write_text(folder / "text.txt", data)
            torch.cuda.empty_cache()  # the run is a process of its own
            for kind in KINDS:
                left = 10 * BUDGET if chosen.tiny else BUDGET - FOR_TESTS - (time.perf_counter() - began)
                results = walk(made, kind, data, folder, left) if left > 0 else "left out: no time"
                failed += isinstance(results, str)
                found = describe(made, kind, data, results, peak) if isinstance(results, dict) else [results]
                print("\n".join([f"[{time.perf_counter() - began:.0f} s]", *found]), flush=True)
    if not (chosen.tiny or chosen.no_tests):
        tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", "-p", "no:cacheprovider"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        failed += bool(subprocess.run(tests, cwd=ROOT, env=environment, check=False).returncode)
    print(f"{time.perf_counter() - began:.0f} s", "" if not failed else f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
