"""What an evaluation costs: time next to a plain forward of transformers, and memory below a checkpoint's size."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import letter_tokenizer
from hydra.utils import instantiate
from omegaconf import OmegaConf
from test_streaming import LINUX, llama_2_7b, watched
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lit_recon.data.python_docs import PythonDocs
from lit_recon.evaluate.perplexity import negative_log_likelihoods
from lit_recon.model.decoder import Decoder
from lit_recon.model.layerwise import final_states
from lit_recon.settings.conf import CONF
from lit_recon.system.device import Compute, bf16_is_fast

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
ROUNDS = 4  # of eight windows each


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> tuple[PreTrainedModel, Tensor]:
    """SmolLM2 from the user's own cache, and 32 windows of 512 tokens of text."""
    monkeypatch.delenv("LIT_RECON_CACHE")
    source = instantiate(OmegaConf.load(CONF / "model" / "smollm2.yaml"))
    text = PythonDocs(num_samples=2, length=64, evaluation_samples=32, evaluation_length=512)
    return source.load(), text.samples(source.tokenizer()).evaluation_ST


def plain(model: PreTrainedModel, tokens_ST: Tensor, compute: Compute) -> list[float]:
    """The loss of each window, as transformers computes it."""
    with torch.no_grad(), compute.autocast():
        return [model(row_1T, labels=row_1T, use_cache=False).loss.item() for row_1T in tokens_ST.split(1)]


def layer_by_layer(model: PreTrainedModel, tokens_ST: Tensor, compute: Compute) -> list[float]:
    """The same, one layer at a time."""
    decoder = Decoder(model, CPU)
    hidden_STD = final_states(decoder, tokens_ST, batch_size=1, compute=compute)
    return negative_log_likelihoods(decoder, hidden_STD, tokens_ST, compute)


def seconds(make: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """Seconds of all threads, which other processes do not lengthen, and the result."""
    start = time.process_time()
    found = make()
    return time.process_time() - start, found


@pytest.mark.smollm2
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_perplexity_is_that_of_transformers_and_takes_at_most_1_15_times_as_long(
    smollm2: tuple[PreTrainedModel, Tensor], precision: str
) -> None:
    if precision == "bf16-mixed" and not bf16_is_fast(CPU):
        pytest.skip("this CPU emulates bfloat16")
    (model, tokens_ST), compute = smollm2, Compute(CPU, precision)
    tolerance = 1e-5 if precision == "32-true" else 1e-2
    layer_by_layer(model, tokens_ST[:2], compute), plain(model, tokens_ST[:2], compute)  # what is made once
    ratios = []
    for turn, some_ST in enumerate(tokens_ST.chunk(ROUNDS)):
        order = (plain, layer_by_layer) if turn % 2 else (layer_by_layer, plain)
        found = {make: seconds(partial(make, model, some_ST, compute)) for make in order}
        (spent, nats), (expected, losses) = found[layer_by_layer], found[plain]
        assert nats == pytest.approx(losses, rel=tolerance)
        ratios.append(spent / expected)
        print(f"{precision}: plain {expected:.2f} s, ours {spent:.2f} s, ratio {ratios[-1]:.3f}")
    print(f"{precision}: ratio {statistics.median(ratios):.3f}")
    assert statistics.median(ratios) <= 1.15


def evaluated(tmp_path: Path, text_file: Path, limit: str, *words: str) -> int:
    """Largest memory of its own, in bytes, of an evaluation of tmp_path/model within a limit."""
    settings = [f"checkpoint={tmp_path / 'model'}", "data=files", f"data.paths=[{text_file}]", f"memory_limit={limit}"]
    _, samples, _ = watched(tmp_path, *settings, *words, program="lit_recon.evaluate")
    peak = max(sample["RssAnon"] for sample in samples)
    print(f"peak {peak / 2**30:.2f} GiB of its own, limit {limit}")
    return peak


@LINUX
def test_a_checkpoint_is_evaluated_in_less_memory_than_it_has_bytes(tmp_path: Path, text_file: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=1536, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=12
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model", max_shard_size="200MB")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    peak = evaluated(
        tmp_path, text_file, "1.2GB", "data.evaluation_samples=8", "data.evaluation_length=64", "data.batch_size=2"
    )
    assert size > 1.3e9 and peak < 1.2e9


@LINUX
def test_a_checkpoint_of_13_gb_is_evaluated_in_4_gib(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "model").mkdir()
    llama_2_7b(tmp_path / "model")
    peak = evaluated(tmp_path, text_file, "4GiB", "data.evaluation_samples=2", "data.evaluation_length=128")
    assert peak < 4 * 2**30
