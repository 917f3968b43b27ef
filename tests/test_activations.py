"""The chain holds what the dense model computes; its DataModule serves that, in order, to the right part."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from conftest import CPU, tiny_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lit_recon.activations import ActivationDataModule, Chain
from lit_recon.blocks import Decoder, decoder_layers, observed
from lit_recon.windows import partition


@pytest.fixture
def many_ST() -> Tensor:
    """Eleven calibration samples and five held-out ones, none a multiple of a batch of two."""
    return torch.randint(0, 64, (16, 12), generator=torch.Generator().manual_seed(2))


def chain_of(model: PreTrainedModel, tokens_ST: Tensor, num_samples: int, batch_size: int = 2) -> Chain:
    return Chain(Decoder(model, CPU.device), tokens_ST, num_samples=num_samples, batch_size=batch_size, compute=CPU)


def hidden_states(model: PreTrainedModel, tokens_ST: Tensor, splits: list[slice]) -> tuple[list[Tensor], list[Tensor]]:
    """What the model itself puts into and gets out of each layer, read by hooks while it runs as users run it."""
    layers = decoder_layers(model)[1]
    inputs, outputs = ([[] for _ in layers] for _ in range(2))
    hooks = []
    for index, layer in enumerate(layers):

        def hook(_: object, args: tuple, kwargs: dict, output: object, index: int = index) -> None:
            inputs[index].append(args[0] if args else kwargs["hidden_states"])
            outputs[index].append(output if isinstance(output, Tensor) else output[0])

        hooks.append(layer.register_forward_hook(hook, with_kwargs=True))
    for rows in splits:
        model(tokens_ST[rows], use_cache=False)
    for handle in hooks:
        handle.remove()
    return [torch.cat(parts) for parts in inputs], [torch.cat(parts) for parts in outputs]


@pytest.mark.parametrize("num_samples", [4, 5], ids=["even batches", "a smaller last batch"])
def test_targets_are_the_dense_models_own_hidden_states_at_every_depth(
    model: PreTrainedModel, tokens_ST: Tensor, num_samples: int
) -> None:
    splits = [slice(0, 2), slice(2, 4), *([slice(4, 6)] if num_samples == 4 else [slice(4, 5), slice(5, 6)])]
    inputs, outputs = hidden_states(model, tokens_ST, splits)
    chain = chain_of(model, tokens_ST, num_samples)
    for depth, window in enumerate(partition(model)):
        # The embeddings may have passed in other batches than the layers: those do not depend on their neighbours.
        assert torch.equal(chain.inputs_STD, inputs[depth]), f"inputs of layer {depth}"
        chain.dense_pass(window, nullcontext())
        assert torch.equal(chain.targets_STD, outputs[depth]), f"targets of layer {depth}"
        chain.advance()
    assert torch.equal(chain.inputs_STD, outputs[-1])


@pytest.mark.parametrize("settings", [{"by": "blocks", "size": 2}, {"by": "model"}], ids=str)
def test_targets_of_larger_windows_are_the_hidden_states_at_their_ends(tokens_ST: Tensor, settings: dict) -> None:
    model = tiny_model("gemma2")
    _, outputs = hidden_states(model, tokens_ST, [slice(start, start + 2) for start in (0, 2, 4)])
    chain = chain_of(model, tokens_ST, 4)
    for window in partition(model, **settings):
        chain.dense_pass(window, nullcontext())
        assert torch.equal(chain.targets_STD, outputs[window.indices[-1]])
        chain.advance()


def test_targets_agree_with_the_hidden_states_that_transformers_reports(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    reported = model(tokens_ST, output_hidden_states=True, use_cache=False).hidden_states
    chain = chain_of(model, tokens_ST, 4)
    torch.testing.assert_close(chain.inputs_STD, reported[0], rtol=0, atol=0)
    for depth, window in enumerate(partition(model)[:-1]):  # the last one is reported behind the final norm
        chain.dense_pass(window, nullcontext())
        torch.testing.assert_close(chain.targets_STD, reported[depth + 1], rtol=1e-5, atol=1e-5)
        chain.advance()


def test_advancing_hands_the_targets_on_without_a_copy(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    chain = chain_of(model, tokens_ST, 4)
    chain.dense_pass(partition(model)[0], nullcontext())
    inputs, targets = chain.inputs_STD, chain.targets_STD
    chain.advance()
    assert chain.inputs_STD is targets and chain.targets_STD is inputs


def test_statistics_see_every_calibration_sample_once_and_no_held_out_one(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    window = partition(model)[0]
    chain = chain_of(model, tokens_ST, 5)
    (first, *_) = window.matrices()
    seen: list[Tensor] = []
    chain.dense_pass(window, observed([first], lambda _, inputs_NI: seen.append(inputs_NI)))
    normed = window.layers[0].input_layernorm(chain.inputs_STD)  # what q_proj of a Llama layer is multiplied by
    torch.testing.assert_close(torch.cat(seen), normed[:5].flatten(0, 1), rtol=1e-5, atol=1e-6)


def test_the_observing_context_is_closed_before_held_out_samples_pass(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    window = partition(model)[0]
    chain = chain_of(model, tokens_ST, 3)
    is_open: list[bool] = [False]
    passed: list[tuple[bool, int]] = []

    @contextmanager
    def observing() -> Iterator[None]:
        is_open[0] = True
        yield
        is_open[0] = False

    handle = window.register_forward_hook(lambda _, args, __: passed.append((is_open[0], len(args[0]))))
    chain.dense_pass(window, observing())
    handle.remove()
    assert passed == [(True, 2), (True, 1), (False, 2), (False, 1)], "no batch holds samples of both kinds"


def order(loader: DataLoader, tokens_ST: Tensor) -> list[int]:
    """Which samples a loader serves in one epoch."""
    return [
        next(index for index, known_T in enumerate(tokens_ST) if torch.equal(known_T, row_T))
        for tokens_BT, _, _ in loader
        for row_T in tokens_BT
    ]


def test_an_epoch_is_a_permutation_of_the_calibration_samples_that_differs_between_epochs(many_ST: Tensor) -> None:
    data = ActivationDataModule(chain_of(tiny_model("llama"), many_ST, 11), batch_size=2, seed=7)
    loader = data.train_dataloader()
    first, second = order(loader, many_ST), order(loader, many_ST)
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second and first != list(range(11))


def test_the_order_follows_from_the_seed_alone(many_ST: Tensor) -> None:
    chain = chain_of(tiny_model("llama"), many_ST, 11)
    orders = []
    for seed, state in ((7, 0), (7, 1), (8, 0)):
        torch.manual_seed(state)
        loader = ActivationDataModule(chain, batch_size=2, seed=seed).train_dataloader()
        orders.append(order(loader, many_ST) + order(loader, many_ST))
    assert orders[0] == orders[1] != orders[2]


def test_validation_holds_exactly_the_held_out_samples_in_order(many_ST: Tensor) -> None:
    data = ActivationDataModule(chain_of(tiny_model("llama"), many_ST, 11), batch_size=2, seed=7)
    assert order(data.val_dataloader(), many_ST) == [11, 12, 13, 14, 15]


@pytest.mark.parametrize(("batch_size", "train", "held_out"), [(2, [2] * 5 + [1], [2, 2, 1]), (8, [8, 3], [5])])
def test_the_last_batch_is_smaller_and_not_dropped(
    many_ST: Tensor, batch_size: int, train: list[int], held_out: list[int]
) -> None:
    data = ActivationDataModule(chain_of(tiny_model("llama"), many_ST, 11), batch_size=batch_size, seed=7)
    for loader, sizes in ((data.train_dataloader(), train), (data.val_dataloader(), held_out)):
        assert len(loader) == len(sizes)
        assert [len(inputs_BTD) for _, inputs_BTD, _ in loader] == sizes


def test_every_batch_replays_the_layers_own_arguments(model: PreTrainedModel, tokens_ST: Tensor) -> None:
    chain = chain_of(model, tokens_ST, 5)
    data = ActivationDataModule(chain, batch_size=2, seed=7)
    for window in partition(model):
        chain.dense_pass(window, nullcontext())
        batches = [
            data.transfer_batch_to_device(batch, CPU.device, 0)
            for loader in (data.train_dataloader(), data.val_dataloader())
            for batch in loader
        ]
        assert [len(batch.inputs_BTD) for batch in batches] == [2, 2, 1, 1]
        for batch in batches:
            outputs_BTD = window(batch.inputs_BTD, batch.calls)
            torch.testing.assert_close(outputs_BTD, batch.targets_BTD, rtol=1e-5, atol=1e-5)
        chain.advance()


def test_batches_can_be_trained_on(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    chain = chain_of(model, tokens_ST, 4)
    window = partition(model)[0].requires_grad_(True)
    chain.dense_pass(window, nullcontext())
    data = ActivationDataModule(chain, batch_size=2, seed=7)
    batch = data.transfer_batch_to_device(next(iter(data.train_dataloader())), CPU.device, 0)
    assert not batch.targets_BTD.requires_grad and not batch.targets_BTD.is_inference()
    (window(batch.inputs_BTD, batch.calls) - 2 * batch.targets_BTD).square().mean().backward()
    assert all(parameter.grad is not None for parameter in window.parameters())


def test_target_variance_is_that_of_the_calibration_targets_around_each_features_mean(many_ST: Tensor) -> None:
    chain = chain_of(tiny_model("gpt2"), many_ST, 11)
    chain.targets_STD = torch.randn(16, 12, 32, generator=torch.Generator().manual_seed(3)) + 10 * torch.arange(32)
    chain.targets_STD[11:] *= 100  # held-out samples do not set the unit
    values = chain.targets_STD[:11].double().numpy().reshape(-1, 32)
    expected = np.mean([np.mean((feature - np.mean(feature)) ** 2) for feature in values.T])
    assert chain.target_variance() == pytest.approx(expected, rel=1e-5)
