"""Memory of streamed runs, by the process's own accounting, and what streaming costs: pytest -m slow -s."""

import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import letter_tokenizer, unmappable
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import LlamaConfig

from lit_recon.settings.conf import CONF

pytestmark = pytest.mark.slow


@pytest.fixture
def model_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own cache, where the model is."""
    monkeypatch.delenv("LIT_RECON_CACHE")


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def llama_2_7b(folder: Path) -> None:
    """A model in the shape of Llama 2 7B, 13.5 GB of random bf16 weights, written shard by shard."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    block = torch.randn(16_777_259, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def random(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return block.repeat(-(-count // len(block)))[:count].view(shape)

    hidden, wide = config.hidden_size, config.intermediate_size
    weight_map = {}
    for index in range(-1, config.num_hidden_layers):
        name = f"model.layers.{index}."
        if index < 0:
            tensors = {
                "model.embed_tokens.weight": random(config.vocab_size, hidden),
                "model.norm.weight": torch.ones(hidden),
            }
            tensors |= {"lm_head.weight": random(config.vocab_size, hidden)}
        else:
            tensors = {f"{name}self_attn.{side}_proj.weight": random(hidden, hidden) for side in "qkvo"}
            tensors |= {f"{name}mlp.{side}_proj.weight": random(wide, hidden) for side in ("gate", "up")}
            tensors |= {f"{name}mlp.down_proj.weight": random(hidden, wide)}
            tensors |= {
                f"{name}{norm}.weight": torch.ones(hidden) for norm in ("input_layernorm", "post_attention_layernorm")
            }
        file = f"model-{index + 2:05}-of-00033.safetensors"
        save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes that a process has of its own, and mapped from files."""
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        kind: 1024 * int(found[1])
        for kind in ("RssAnon", "RssFile", "VmHWM")
        if (found := re.search(rf"{kind}:\s+(\d+)", status))
    }


class Watched(NamedTuple):
    """What a run printed, its memory ten times a second, and the least of its own that it had in each window."""

    output: str
    samples: list[dict[str, int]]
    kept: list[int]


def watched(folder: Path, *settings: str, program: str = "lit_recon.fit") -> Watched:
    """Run a command in a process of its own and watch it."""
    command = [sys.executable, "-m", program, *settings]
    samples: list[dict[str, int]] = []
    kept: dict[int, int] = {}  # by windows done: what is there beside what the window in work takes
    path = folder / "log"
    with path.open("w") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:
        while process.poll() is None:
            done = len(re.findall(r"^\d+/\d+ ", path.read_text(), re.MULTILINE))
            found = memory(process.pid)
            if "RssAnon" in found:
                samples.append(found)
                kept[done] = min(kept.get(done, found["RssAnon"]), found["RssAnon"])
            time.sleep(0.1)
    output = path.read_text()
    print(output)
    assert process.returncode == 0, output
    return Watched(output, samples, [kept[done] for done in sorted(kept) if done])


@LINUX
def test_a_model_of_13_gb_goes_through_two_windows_in_4_gib(tmp_path: Path, text_file: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    llama_2_7b(model)
    output, samples, _ = watched(
        tmp_path,
        "model=hf",
        f"model.name={model}",
        "data=files",
        f"data.paths=[{text_file}]",
        "data.num_samples=8",
        "data.length=256",
        "data.num_held_out=2",
        "data.evaluation_samples=2",
        "data.evaluation_length=128",
        f"output_dir={tmp_path / 'run'}",
        "memory_limit=4GiB",
        "stop_after=2",
    )
    peak, mapped = (max(sample[kind] for sample in samples) for kind in ("RssAnon", "RssFile"))
    print(f"peak {peak / 2**30:.2f} GiB of its own, {mapped / 2**30:.2f} GiB mapped")
    assert "2 of 64 windows are done" in output and " more)" in output
    assert peak < 4 * 2**30


@LINUX
def test_qwen2_5_coder_1_5b_goes_through_two_windows_in_3_gb(tmp_path: Path, model_cache: None) -> None:
    folder = instantiate(OmegaConf.load(CONF / "model" / "qwen2_5_coder_1_5b.yaml")).folder  # fetched apart: 8 GB, once
    output, samples, _ = watched(tmp_path, "model=qwen2_5_coder_1_5b", f"output_dir={tmp_path / 'run'}", "stop_after=2")
    peak, mapped = (max(sample[kind] for sample in samples) for kind in ("RssAnon", "RssFile"))
    print(f"{folder}: peak {peak / 1e9:.2f} GB of its own, {mapped / 1e9:.2f} GB mapped")
    assert "2 of 28 windows are done" in output
    assert peak < 3e9


@LINUX
def test_the_default_run_stays_below_one_and_a_half_gigabytes_and_flat(tmp_path: Path, model_cache: None) -> None:
    _, samples, kept = watched(tmp_path, f"output_dir={tmp_path / 'run'}")
    peak = max(sample["VmHWM"] for sample in samples)
    print(f"peak {peak / 1e9:.2f} GB; of its own, MB, least in each window: {[size // 10**6 for size in kept]}")
    assert peak < 1.5e9
    assert len(kept) == 30
    # A window may be shorter than the time between two looks at it. Behind the last one, results are measured.
    early, late = statistics.median(kept[2:7]), statistics.median(kept[24:29])
    assert late < 1.02 * early


def test_streaming_costs_less_than_five_percent(tmp_path: Path, model_cache: None) -> None:
    streamed = instantiate(OmegaConf.load(CONF / "model" / "smollm2.yaml")).folder
    models = {"true": streamed, "false": unmappable(streamed, tmp_path / "model")}
    seconds: dict[str, list[float]] = {"true": [], "false": []}
    for turn in range(2):
        for stream, found in seconds.items():
            run = tmp_path / f"{stream}_{turn}"
            model = ("model=hf", f"model.name={models[stream]}", "model.dtype=float32")
            output, *_ = watched(tmp_path, f"output_dir={run}", *model)
            assert ("the model is in memory as a whole" in output) == (stream == "false")
            spent = json.loads((run / "results.json").read_text())["seconds"]
            found.append(spent["total"] - spent["evaluate"])
    ratio = min(seconds["true"]) / min(seconds["false"])
    print(f"seconds without evaluation: {seconds}; streamed / in memory {ratio:.3f}")
    assert ratio < 1.05
