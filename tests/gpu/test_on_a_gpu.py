"""What holds on a GPU: the same walk wherever hidden states are, steps that wait for nothing, and the plan's memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ended, fitter, letter_tokenizer, masks_of, module, numbers, trainer
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lit_recon.activations.chain import Chain
from lit_recon.activations.datamodule import Activations
from lit_recon.activations.passes import Passes
from lit_recon.activations.propagation import Propagation
from lit_recon.activations.store import MemoryStore, PinnedStore, Store
from lit_recon.data.packing import PADDING
from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import Decoder
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import partition
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner, prune
from lit_recon.reconstruction.driver import walk
from lit_recon.reconstruction.window_fit import WindowFitter
from lit_recon.reconstruction.window_result import WindowResult
from lit_recon.system.device import Compute
from lit_recon.system.transfer import CopyStream, moved, pinned_zeros, put

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda", 0)
ON_GPU = ("trainer.accelerator=cuda", "trainer.precision=32-true")


def walked(
    tokens_ST: Tensor, store: Store, run: Path, propagation: Propagation | None = None
) -> tuple[list[WindowResult], list[Tensor]]:
    """The results of a walk over a tiny Llama in bf16 on the GPU, and its weights."""
    model, compute = tiny_model("llama").bfloat16(), Compute(GPU, "32-true")
    passes = Passes(Decoder(model, GPU), tokens_ST, num_samples=4, batch_size=2, compute=compute, store=store)
    chain = Chain(passes, propagation or Propagation(inputs="dense"))
    make = compute.trainers(trainer(accelerator="cuda", max_epochs=2))
    results = walk(
        partition(model),
        chain=chain,
        pruner=Pruner(Wanda(), Unstructured(sparsity=0.5), chain),
        fitter=WindowFitter(module(), make, device=GPU, seed=0),
        weights=WeightOffloader(model, GPU),
    )
    return results, [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("inputs", ["dense", "sparse", "mix"])
def test_a_walk_is_the_same_wherever_its_hidden_states_are(inputs: str, tokens_ST: Tensor, tmp_path: Path) -> None:
    propagation = Propagation(inputs=inputs)
    stores = [
        MemoryStore(torch.bfloat16, GPU),
        MemoryStore(torch.bfloat16),
        PinnedStore(torch.bfloat16, CopyStream(GPU)),
    ]
    expected, weights = walked(tokens_ST, stores[0], tmp_path, propagation)
    assert any(one.accepted for one in expected)
    for store in stores[1:]:
        found, others = walked(tokens_ST, store, tmp_path, propagation)
        for one, other in zip(expected, found, strict=True):
            assert one.held_out_before == pytest.approx(other.held_out_before, rel=1e-4)
            assert one.held_out_after == pytest.approx(other.held_out_after, rel=1e-2)
        assert all(torch.allclose(one, other, atol=2e-2) for one, other in zip(weights, others, strict=True))


def test_pinned_memory_is_pinned_and_copies_from_and_to_it_are_whole() -> None:
    array = pinned_zeros((64, 33, 70), torch.bfloat16)
    assert array.is_pinned() and array[3].is_pinned()
    values = torch.randn(64, 33, 70, device=GPU)
    put(array, values)
    torch.cuda.synchronize()
    assert torch.equal(array, values.bfloat16().cpu())
    back = moved(array, GPU)
    assert back.dtype == torch.bfloat16 and torch.equal(back, values.bfloat16())


class NoWaiting(Callback):
    """Raises where the CPU waits for the GPU between the second training step and the last."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if batch_idx == 2:
            torch.cuda.set_sync_debug_mode("error")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("where", ["device", "pinned"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_no_training_step_waits_for_the_gpu(where: str, padded: bool, tokens_ST: Tensor, tmp_path: Path) -> None:
    tokens_ST = tokens_ST.repeat(5, 1)
    if padded:
        tokens_ST[::3, 9:] = PADDING
    model, compute = tiny_model("llama"), Compute(GPU, "bf16-mixed")
    pinned = PinnedStore(torch.bfloat16, CopyStream(GPU))
    store = MemoryStore(torch.bfloat16, GPU) if where == "device" else pinned
    passes = Passes(Decoder(model, GPU), tokens_ST, num_samples=26, batch_size=2, compute=compute, store=store)
    chain, window = Chain(passes, Propagation(inputs="dense")), partition(model)[0]
    weights = WeightOffloader(model, GPU)
    weights.onload(window)
    pruner = Pruner(Wanda(), Unstructured(sparsity=0.5), chain)
    masks = masks_of(pruner, window)
    prune(window, masks)
    data = Activations.from_chain(chain)
    for row in range(0, 26, 2):  # layers' arguments are recorded once for each shape
        data.batch(torch.tensor([row, row + 1]), GPU)
    made = fitter(tmp_path, module(), max_epochs=1, val_check_interval=1.0)
    made.trainer = compute.trainers(trainer(accelerator="cuda", precision="bf16-mixed", max_epochs=1))
    made.device, made.callbacks = GPU, [NoWaiting()]
    result = made.fit(window, masks, data)
    assert result.steps >= 13


def results_of(run: str) -> dict:
    return json.loads((Path(run) / "results.json").read_text())


def test_a_run_that_is_resumed_ends_with_the_same_windows_and_nearly_the_same_numbers(
    tiny_run: Callable[..., Ended],
) -> None:
    """Same bytes are promised for CPUs; sums of a GPU may come in another order each time."""
    assert tiny_run(*ON_GPU, "output_dir=whole").status == 0
    assert tiny_run(*ON_GPU, "stop_after=2").status == 0
    ended = tiny_run("resume=run")
    assert ended.status == 0, ended.err
    whole, resumed = results_of("whole"), results_of("run")
    for one, other in zip(whole["windows"], resumed["windows"], strict=True):
        assert one["name"] == other["name"] and one["steps"] == other["steps"]
        assert one["held_out_after"] == pytest.approx(other["held_out_after"], rel=1e-2)
    for state, value in whole["perplexity"].items():
        assert resumed["perplexity"][state] == pytest.approx(value, rel=1e-3)
    assert numbers(Path("run")).keys() == numbers(Path("whole")).keys()


def test_hidden_states_on_the_gpu_are_chosen_where_they_fit_and_as_good(tiny_run: Callable[..., Ended]) -> None:
    found = {}
    for store in ("auto", "device", "memory"):
        ended = tiny_run(*ON_GPU, f"store={store}", "overwrite=true")
        assert ended.status == 0, ended.err
        assert ("GPU memory as bfloat16" in ended.err + ended.out) == (store != "memory")
        found[store] = results_of("run")["perplexity"]["reconstructed"]
    assert found["auto"] == pytest.approx(found["device"], rel=1e-3)
    assert found["memory"] == pytest.approx(found["device"], rel=1e-2)


@pytest.mark.parametrize("windows", ["block", "half"])
def test_both_peaks_of_memory_are_predicted_within_a_fifth(
    windows: str, tiny_run: Callable[..., Ended], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).bfloat16().save_pretrained(tmp_path / "larger")
    letter_tokenizer().save_pretrained(tmp_path / "larger")
    longer = ("data.num_samples=16", "data.length=512", "data.evaluation_length=64", "data.num_held_out=2")
    ended = tiny_run(
        f"model.name={tmp_path / 'larger'}", "trainer.accelerator=cuda", "chain.inputs=dense", f"windows={windows}",
        "module.optimizer.lr=1e-4", *longer,
    )  # fmt: skip
    assert ended.status == 0, ended.err
    results = results_of("run")
    for name in ("walk_peak_memory_bytes", "walk_peak_host_bytes"):
        measured, predicted = results[name], results["predicted"][name]
        assert abs(predicted / measured - 1) < 0.2, f"{name}: {measured / 1e6:.0f} MB, predicted {predicted / 1e6:.0f}"
