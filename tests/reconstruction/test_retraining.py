"""All layers are trained at once as windows are, towards the dense model or the text, on embeddings made per batch."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import CPU, assert_close, chain_of, masks_of, module, trainer
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.activations.datamodule import Batch
from lit_recon.activations.token_samples import TokenSamples
from lit_recon.data.packing import PADDING
from lit_recon.model.architectures import VOCABULARY, tiny_model
from lit_recon.model.matrices import find_matrices
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import partition
from lit_recon.model.windows import DecoderWindow
from lit_recon.modules.losses import cross_entropy, hidden_states, kl_divergence, mean_squared
from lit_recon.modules.mask_lora import MaskLora
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.modules.norms_biases import NormsBiases
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.masks import Masks
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner, prune
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.reconstruction.fit_state import FitCommits, FitState
from lit_recon.reconstruction.retraining import Retrained, Retraining, open_retraining, retrain
from lit_recon.reconstruction.window_fit import WindowFitter
from lit_recon.reconstruction.window_result import WindowResult

LOSSES = (cross_entropy, kl_divergence, hidden_states, mean_squared)


def opened(
    model: PreTrainedModel, tokens_ST: Tensor, num_samples: int = 4, *, batch_size: int = 2, **settings: object
) -> tuple[Retrained, WeightOffloader]:
    """All layers of a dense model, on the CPU in float32."""
    passes = chain_of(model, tokens_ST, num_samples, batch_size).passes
    weights = WeightOffloader(model, CPU.device)
    return open_retraining(Retraining(**settings), passes, find_matrices(model), weights), weights


def pruned(model: PreTrainedModel, tokens_ST: Tensor) -> Masks:
    """Masks of half of all weights, which are zeroed."""
    chain = chain_of(model, tokens_ST, 4)
    (window,) = partition(model, by="model")
    masks = masks_of(Pruner(Magnitude(), Unstructured(sparsity=0.5), chain), window)
    prune(window, masks)
    return Masks.pack(masks)


def whole_batch(data: TokenSamples, count: int) -> Batch:
    return data.batch(torch.arange(count), CPU.device)


def losses_of(retrained: Retrained, loss: Callable[..., Tensor], batch: Batch) -> Tensor:
    """The loss of each token, as a module takes it."""
    return MaskedWeights(retrained.window, {}, retrained.data.unit(), loss=loss).losses(batch)


def test_cross_entropy_is_the_loss_of_transformers(model: PreTrainedModel, padded_ST: Tensor) -> None:
    retrained, _ = opened(model, padded_ST, loss=cross_entropy)
    batch = whole_batch(retrained.data, 5)
    with torch.no_grad():
        found = losses_of(retrained, cross_entropy, batch).mean()
        is_text_ST = padded_ST != PADDING
        labels_ST = padded_ST.where(is_text_ST, -100)
        inputs = {"input_ids": padded_ST.where(is_text_ST, 0), "attention_mask": is_text_ST.long()}
        expected = model(**inputs, labels=labels_ST).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert batch.num_tokens == int((is_text_ST.sum(1) - 1).sum()), "the last token of a sample has no next one"


@pytest.mark.parametrize("targets", ["tokens", "logits"])
def test_samples_of_its_own_take_the_place_of_calibration_samples(
    model: PreTrainedModel, padded_ST: Tensor, targets: str
) -> None:
    loss = cross_entropy if targets == "tokens" else kl_divergence
    passes, weights = chain_of(model, padded_ST, 4, 2).passes, WeightOffloader(model, CPU.device)
    own_ST = torch.randint(VOCABULARY, (3, padded_ST.shape[1]), generator=torch.Generator().manual_seed(5))
    own_ST[2, -5:] = PADDING
    opened_once = open_retraining(Retraining(loss=loss), passes, find_matrices(model), weights, samples_ST=own_ST)
    data = opened_once.data
    assert data.batching.num_samples == 3 and passes.batching.num_samples == 4
    assert torch.equal(data.inputs_STD, torch.cat([own_ST, padded_ST[4:]]))
    rows = [int(row) for batch in data.data_module(0).train_dataloader() for row in batch]
    assert sorted(rows) == [0, 1, 2]
    assert [int(row) for batch in data.data_module(0).val_dataloader() for row in batch] == [3]
    text = int((own_ST != PADDING).sum()) - (3 if targets == "tokens" else 0)
    assert whole_batch(data, 3).num_tokens == text
    held_out, same = data.held_out_errors(opened_once.window, 1.0), opened(model, padded_ST, loss=loss)[0]
    assert held_out == same.data.held_out_errors(same.window, 1.0)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_dense_model_has_no_error_of_its_own_states_and_logits(tokens_ST: Tensor, loss: Callable) -> None:
    retrained, _ = opened(tiny_model("llama"), tokens_ST, loss=loss)
    calibration, held_out = retrained.data.errors(retrained.window, retrained.data.unit())
    if loss is cross_entropy:
        assert calibration.mean > 1 and held_out.mean > 1
    else:
        assert max(*map(abs, calibration), *map(abs, held_out)) < 1e-6


@pytest.mark.parametrize("padded", [False, True])
def test_errors_of_hidden_states_are_in_the_unit_of_each_layer(
    tokens_ST: Tensor, padded_ST: Tensor, padded: bool
) -> None:
    model = tiny_model("llama")
    samples_ST = padded_ST if padded else tokens_ST
    retrained, _ = opened(model, samples_ST, 3, loss=hidden_states)
    is_text_ST = samples_ST != PADDING

    def states(count: slice) -> list[Tensor]:
        inputs = {
            "input_ids": samples_ST[count].where(is_text_ST[count], 0),
            "attention_mask": is_text_ST[count].long(),
        }
        found: list[Tensor] = []
        hooks = [one.register_forward_hook(lambda *given: found.append(given[2])) for one in retrained.window.layers]
        first = retrained.window.layers[0].register_forward_pre_hook(lambda _, given: found.append(given[0]))
        with torch.no_grad():
            model.base_model(**inputs, use_cache=False)
        for hook in (*hooks, first):
            hook.remove()
        return [one if isinstance(one, Tensor) else one[0] for one in found]

    calibration, held_out = states(slice(0, 3)), states(slice(3, None))
    text_N = is_text_ST[:3]
    units = [(b - a).square().mean(-1)[text_N].median() for a, b in zip(calibration, calibration[1:], strict=False)]
    assert retrained.data.unit() == 1.0
    assert_close(torch.tensor(retrained.window.units), torch.stack(units))
    with torch.no_grad():
        for parameter in retrained.window.parameters():
            parameter.mul_(0.9)
    changed = states(slice(3, None))
    by_layer = [
        (a - b).square().mean(-1)[is_text_ST[3:]].mean() / unit
        for a, b, unit in zip(changed[1:], held_out[1:], units, strict=True)
    ]
    found = retrained.data.errors(retrained.window, 1.0)[1].mean
    assert found == pytest.approx(torch.stack(by_layer).mean().item(), rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_the_same_where_layers_are_computed_again(padded_ST: Tensor, loss: Callable) -> None:
    gradients = []
    for checkpoint_layers in (True, False):
        model = tiny_model("llama")
        retrained, _ = opened(model, padded_ST, loss=loss, checkpoint_layers=checkpoint_layers)
        pruned(model, padded_ST)
        retrained.window.requires_grad_(True)
        retrained.data.unit()
        losses_of(retrained, loss, whole_batch(retrained.data, 4)).mean().backward()
        gradients.append([parameter.grad for parameter in retrained.window.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None and one.abs().sum() > 0
        assert_close(one, other, "gradients")


def test_layers_that_are_computed_again_keep_the_activations_of_one(tokens_ST: Tensor) -> None:
    kept = {}
    for checkpoint_layers in (True, False):
        retrained, _ = opened(tiny_model("llama"), tokens_ST, loss=kl_divergence, checkpoint_layers=checkpoint_layers)
        retrained.window.requires_grad_(True)
        batch, sizes = whole_batch(retrained.data, 4), []
        weights = {one.data_ptr() for one in retrained.window.parameters()}

        def count(tensor: Tensor, sizes: list[int] = sizes, weights: set[int] = weights) -> Tensor:
            sizes.append(tensor.nbytes if tensor.data_ptr() not in weights else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            retrained.window(batch.inputs_BTD, batch.calls)
        kept[checkpoint_layers] = sum(sizes)
    assert kept[True] < kept[False] / 10


def fit(
    retrained: Retrained, weights: WeightOffloader, masks: Masks, loss: Callable, lr: float, **settings: object
) -> object:
    fitter = WindowFitter(
        module(lr, loss=loss),
        trainer(**settings),
        device=CPU.device,
        seed=0,
        fitting=FitSettings(retry_rates=()),
    )
    (result,) = retrain(retrained, masks, fitter=fitter, weights=weights)
    return result


def test_the_divergence_of_a_dense_copy_with_perturbed_weights_goes_to_nothing_on_one_batch(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    samples_ST = tokens_ST[:2].repeat(2, 1)  # held out is what it is trained on
    retrained, weights = opened(model, samples_ST, 2, loss=kl_divergence)
    with torch.no_grad():
        for parameter in retrained.window.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.add_(noise, alpha=0.1 * parameter.std(correction=0).item())
    result = fit(retrained, weights, Masks(), kl_divergence, 5e-3, max_epochs=120)
    assert result.accepted and result.steps == 120 and result.measure == "KL divergence"
    assert result.held_out_before > 1e-3
    assert result.held_out_after < 0.01 * result.held_out_before


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", ["llama", "gpt2", "mixtral"])
def test_pruned_weights_stay_zero_and_the_rest_gets_better(tokens_ST: Tensor, shape: str, loss: Callable) -> None:
    model = tiny_model(shape)
    samples_ST = tokens_ST[:1].expand(6, -1) if loss is cross_entropy else tokens_ST  # text that can be learnt
    retrained, weights = opened(model, samples_ST, loss=loss)
    outside = {
        name: one.clone() for name, one in model.named_parameters() if ".layers." not in name and ".h." not in name
    }
    masks = pruned(model, tokens_ST)
    result = fit(retrained, weights, masks, loss, 3e-3, max_epochs=4)
    assert result.name == "global" and result.steps == 8
    assert result.relative_error_after < result.relative_error_before
    for name in masks:
        weight = model.get_parameter(name)
        assert weight[~masks[name]].abs().sum() == 0 and weight[masks[name]].abs().sum() > 0
    for name, before in outside.items():
        assert torch.equal(model.get_parameter(name), before), name


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(("num_samples", "batch_size", "accumulate"), [(5, 2, 1), (5, 2, 2), (7, 3, 2), (4, 4, 3)])
def test_the_optimizer_makes_as_many_steps_as_epochs_batches_and_accumulation_say(
    num_samples: int, batch_size: int, accumulate: int, epochs: int
) -> None:
    tokens_ST = torch.randint(3, VOCABULARY, (num_samples + 1, 8), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama")
    retrained, weights = opened(model, tokens_ST, num_samples, batch_size=batch_size)
    steps = []

    class Counting(MaskedWeights):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            super().on_before_optimizer_step(optimizer)
            steps.append(self.window.layers[0].self_attn.q_proj.weight.grad.norm())

    fitter = WindowFitter(
        module(1e-3, loss=kl_divergence, cls=Counting),
        trainer(max_epochs=epochs, accumulate_grad_batches=accumulate),
        device=CPU.device,
        seed=0,
        fitting=FitSettings(retry_rates=()),
    )
    (result,) = retrain(retrained, pruned(model, tokens_ST), fitter=fitter, weights=weights)
    batches = -(-num_samples // batch_size)
    assert result.steps == len(steps) == epochs * -(-batches // accumulate)


@pytest.mark.parametrize("loss", [cross_entropy, kl_divergence])
def test_how_samples_fall_into_batches_does_not_matter(padded_ST: Tensor, loss: Callable) -> None:
    """A batch of another size, or with more padding, weighs by its tokens."""
    found = []
    for batches in ([[0, 1, 2, 3]], [[0], [1, 2, 3]], [[3, 1], [0, 2]]):
        model = tiny_model("llama")
        retrained, _ = opened(model, padded_ST, loss=loss)
        pruned(model, padded_ST)
        retrained.window.requires_grad_(True)
        made = MaskedWeights(retrained.window, {}, 1.0, loss=loss)
        for rows in batches:
            batch = retrained.data.batch(torch.tensor(rows), CPU.device)
            (made.losses(batch).mean() * batch.weight).backward()
        found.append(torch.cat([one.grad.flatten() for one in retrained.window.parameters()]))
    for one in found[1:]:
        assert_close(one, found[0], "gradients")


class Broken(MaskedWeights):
    """Its third step has a loss that is not finite; the loss on held-out samples rises from the second one on."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step == 2 else loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss/held_out", abs(self.trainer.global_step - 2.0), batch_size=1)


@pytest.mark.parametrize(("keep", "kept_step"), [("last", 6), ("best", 2)])
def test_a_fit_that_has_gone_on_at_half_the_rate_does_so_when_it_is_resumed(
    tokens_ST: Tensor, keep: str, kept_step: int
) -> None:
    states: list[FitState] = []

    def save(state: FitState) -> None:
        values = json.loads(json.dumps(state.values))
        tensors = {name: one.clone() for name, one in state.tensors.items()}
        states.append(FitState(step=state.step, tries=list(state.tries), values=values, tensors=tensors))

    def fitted(state: FitState | None = None) -> tuple[WindowResult, list[Tensor]]:
        model = tiny_model("llama")
        retrained, weights = opened(model, tokens_ST)
        fitter = WindowFitter(
            module(1e-2, cls=Broken, loss=kl_divergence),
            trainer(max_epochs=3, log_every_n_steps=1),
            device=CPU.device,
            seed=0,
            fitting=FitSettings(retry_rates=(), keep=keep),
            commits=FitCommits(1, save, state),
        )
        (result,) = retrain(retrained, pruned(model, tokens_ST), fitter=fitter, weights=weights)
        return replace(result, seconds=0.0), list(model.parameters())

    result, whole = fitted()
    assert result.halved and (result.steps, result.kept_step) == (6, kept_step), result
    first, states = states, []
    assert [state.step for state in first] == [1, 2, 3, 4, 5]
    for state in first:
        again, weights = fitted(state)
        assert again == result, state.step
        assert all(torch.equal(one, other) for one, other in zip(weights, whole, strict=True)), state.step


class InOneStep(Callback):
    """Counts the bytes of gradients and of the optimizer's state that there are at the end of a step, by any name."""

    bytes = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        assert isinstance(pl_module, MaskedWeights)
        everything = {id(one): one for one in (*pl_module.parameters(), *pl_module.window.parameters())}.values()
        (optimizer,) = trainer.optimizers
        tensors = [one.grad for one in everything if one.grad is not None]
        tensors += [value for state in optimizer.state.values() for value in state.values()]
        self.bytes = sum(one.nbytes for one in tensors)


@pytest.mark.parametrize("loss", [cross_entropy, kl_divergence])
def test_norms_and_low_rank_changes_of_all_layers_take_less_memory_than_all_weights(
    tokens_ST: Tensor, loss: Callable
) -> None:
    taken, rank, moments = {}, 2, 2
    for name, settings in (("all", {}), ("low rank", {"cls": MaskLora, "rank": rank}), ("norms", {"cls": NormsBiases})):
        model, counted = tiny_model("llama"), InOneStep()
        retrained, weights = opened(model, tokens_ST, loss=loss)
        fitter = WindowFitter(
            module(1e-3, loss=loss, **settings),
            trainer(max_epochs=1),
            device=CPU.device,
            seed=0,
            fitting=FitSettings(retry_rates=()),
            callbacks=[counted],
        )
        retrain(retrained, pruned(model, tokens_ST), fitter=fitter, weights=weights)
        taken[name] = counted.bytes
        assert all(one.grad is None for one in model.parameters())
    layers = model.model.layers
    shapes = [one.shape for layer in layers for one in layer.parameters()]
    norms = sum(shape.numel() for shape in shapes if len(shape) == 1)
    matrices = sum(shape.numel() for shape in shapes if len(shape) == 2)
    changes = rank * sum(sum(shape) for shape in shapes if len(shape) == 2)

    def in_bytes(trained: int, tensors: int) -> int:  # a number of steps for each tensor
        return 4 * (trained * (1 + moments) + tensors)

    count = sum(len(shape) == 2 for shape in shapes)
    assert taken["all"] == in_bytes(matrices + norms, len(shapes))
    assert taken["low rank"] == in_bytes(changes + norms, len(shapes) + count)
    assert taken["norms"] == in_bytes(norms, len(shapes) - count)
    assert 0 < 10 * taken["norms"] < taken["low rank"] < taken["all"] / 2


def test_the_teacher_stays_dense_while_the_model_changes(tokens_ST: Tensor) -> None:
    model = tiny_model("gemma2")
    retrained, _ = opened(model, tokens_ST)
    before = whole_batch(retrained.data, 4).targets_BTD
    masks = pruned(model, tokens_ST)
    assert len(masks)
    with torch.no_grad():
        for parameter in retrained.window.parameters():
            parameter.add_(1.0)
    assert torch.equal(whole_batch(retrained.data, 4).targets_BTD, before)


def test_a_window_of_all_layers_is_the_model(model: PreTrainedModel, padded_ST: Tensor) -> None:
    retrained, _ = opened(model, padded_ST)
    assert isinstance(retrained.window, DecoderWindow) and retrained.window.head is not None
    batch = whole_batch(retrained.data, 5)
    is_text_ST = padded_ST != PADDING
    with torch.no_grad():
        logits_BTV = retrained.window.head(retrained.window(batch.inputs_BTD, batch.calls))
        expected = model(padded_ST.where(is_text_ST, 0), attention_mask=is_text_ST.long(), use_cache=False).logits
    assert_close(logits_BTV[is_text_ST], expected[is_text_ST], "logits")


@pytest.mark.parametrize(
    "wrong", [{"rate": 0.0}, {"rate": 2.0}, {"commit_every": 0}, {"max_epochs": 0}], ids=lambda one: next(iter(one))
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"retraining.{name}={value}: expected"):
        Retraining(**wrong)
    assert Retraining(loss=partial(cross_entropy)).describe()["retraining_loss"] == "cross_entropy"
