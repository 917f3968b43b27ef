"""The chain holds what the dense model computes; its DataModule serves that, in order, to the right part."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
import torch
from conftest import CPU, chain_of
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lit_recon.activations.datamodule import ActivationDataModule, Activations, Batch, places_of
from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import decoder_layers
from lit_recon.model.partition import partition
from lit_recon.model.products import observing_products
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.statistics import Statistics
from lit_recon.system.finite import NotFinite


@pytest.fixture
def many_ST() -> Tensor:
    """Eleven calibration samples and five held-out ones, none a multiple of a batch of two."""
    return torch.randint(0, 64, (16, 12), generator=torch.Generator().manual_seed(2))


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
        chain.dense_pass(window)
        assert torch.equal(chain.targets_STD, outputs[depth]), f"targets of layer {depth}"
        chain.advance(window)
    assert torch.equal(chain.inputs_STD, outputs[-1])


@pytest.mark.parametrize("settings", [{"by": "blocks", "size": 2}, {"by": "model"}], ids=str)
def test_targets_of_larger_windows_are_the_hidden_states_at_their_ends(tokens_ST: Tensor, settings: dict) -> None:
    model = tiny_model("gemma2")
    _, outputs = hidden_states(model, tokens_ST, [slice(start, start + 2) for start in (0, 2, 4)])
    chain = chain_of(model, tokens_ST, 4)
    for window in partition(model, **settings):
        chain.dense_pass(window)
        assert torch.equal(chain.targets_STD, outputs[window.indices[-1]])
        chain.advance(window)


def test_targets_agree_with_the_hidden_states_that_transformers_reports(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    reported = model(tokens_ST, output_hidden_states=True, use_cache=False).hidden_states
    chain = chain_of(model, tokens_ST, 4)
    torch.testing.assert_close(chain.inputs_STD, reported[0], rtol=0, atol=0)
    for depth, window in enumerate(partition(model)[:-1]):  # the last one is reported behind the final norm
        chain.dense_pass(window)
        torch.testing.assert_close(chain.targets_STD, reported[depth + 1], rtol=1e-5, atol=1e-5)
        chain.advance(window)


def test_advancing_hands_the_targets_on_without_a_copy(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    chain = chain_of(model, tokens_ST, 4)
    first, second, _ = partition(model)
    chain.dense_pass(first)
    inputs, targets = chain.inputs_STD, chain.targets_STD
    chain.advance(first)
    assert chain.inputs_STD is targets
    chain.dense_pass(second)
    assert chain.targets_STD is inputs, "the memory of the inputs, which nothing needs any more"


class Remembering(Magnitude):
    """A criterion whose statistics are all the inputs that it gets."""

    def start(self, weight_OI: Tensor) -> list[Tensor]:
        return []

    def update(self, statistics: list[Tensor], inputs_NI: Tensor) -> list[Tensor]:
        return [*statistics, inputs_NI]


def test_statistics_see_every_calibration_sample_once_and_no_held_out_one(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    window = partition(model)[0]
    chain = chain_of(model, tokens_ST, 5)
    (first, *_) = window.matrices()
    statistics = Statistics(Remembering(), [first])
    chain.dense_pass(window, [statistics])
    normed = window.layers[0].input_layernorm(chain.inputs_STD)  # what q_proj of a Llama layer is multiplied by
    (seen,) = statistics.by_name[first.name]
    torch.testing.assert_close(torch.cat(seen), normed[:5].flatten(0, 1), rtol=1e-5, atol=1e-6)


def test_each_part_of_the_samples_is_watched_once_and_by_itself(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    window = partition(model)[0]
    chain = chain_of(model, tokens_ST, 5)
    (first, *_) = window.matrices()
    seen: dict[str, list[Tensor]] = {"calibration": [], "held_out": []}

    class Remembered:
        def observing(self, part: str) -> AbstractContextManager:
            return observing_products([first], lambda product: seen[part].append(product.rows_NI))

    chain.dense_pass(window, [Remembered()])
    normed = window.layers[0].input_layernorm(chain.inputs_STD)
    for part, samples in {"calibration": slice(0, 5), "held_out": slice(5, 6)}.items():
        torch.testing.assert_close(torch.cat(seen[part]), normed[samples].flatten(0, 1), rtol=1e-5, atol=1e-6)


def test_the_observing_context_is_closed_before_held_out_samples_pass(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    window = partition(model)[0]
    chain = chain_of(model, tokens_ST, 3)
    is_open: list[str] = []
    passed: list[tuple[str, int]] = []

    class Opening:
        @contextmanager
        def observing(self, part: str) -> Iterator[None]:
            is_open.append(part)
            yield
            is_open.remove(part)

    handle = window.register_forward_hook(lambda _, args, __: passed.append((*is_open, len(args[0]))))
    chain.dense_pass(window, [Opening()])
    handle.remove()
    calibration, held_out = [("calibration", 2), ("calibration", 1)], [("held_out", 2), ("held_out", 1)]
    assert passed == calibration + held_out, "no batch holds samples of both kinds"


def activations_of(tokens_ST: Tensor, batch_size: int = 2) -> Activations:
    """Those of the first layer of a tiny Llama, eleven samples of which are for calibration."""
    model = tiny_model("llama")
    chain = chain_of(model, tokens_ST, 11, batch_size)
    chain.dense_pass(partition(model)[0])
    return Activations.from_chain(chain)


def order(loader: DataLoader, activations: Activations) -> list[int]:
    """Which samples a loader serves in one epoch, by what they contain."""
    served = []
    for rows_B in loader:
        batch = activations.batch(rows_B, CPU.device)
        for row, input_TD, target_TD in zip(rows_B.tolist(), batch.inputs_BTD, batch.targets_BTD, strict=True):
            equal = (activations.inputs_STD == input_TD).all((1, 2)) & (activations.targets_STD == target_TD).all(
                (1, 2)
            )
            assert equal.nonzero().flatten().tolist() == [row], "inputs and targets are those of the sample"
            served.append(row)
    return served


def test_an_epoch_is_a_permutation_of_the_calibration_samples_that_differs_between_epochs(many_ST: Tensor) -> None:
    activations = activations_of(many_ST)
    loader = activations.data_module(seed=7).train_dataloader()
    first, second = order(loader, activations), order(loader, activations)
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second and first != list(range(11))


def test_the_order_follows_from_the_seed_alone(many_ST: Tensor) -> None:
    activations = activations_of(many_ST)
    orders = []
    for seed, state in ((7, 0), (7, 1), (8, 0)):
        torch.manual_seed(state)
        loader = ActivationDataModule(activations, seed=seed).train_dataloader()
        orders.append(order(loader, activations) + order(loader, activations))
    assert orders[0] == orders[1] != orders[2]


def test_validation_holds_exactly_the_held_out_samples_in_order(many_ST: Tensor) -> None:
    activations = activations_of(many_ST)
    assert order(activations.data_module(seed=7).val_dataloader(), activations) == [11, 12, 13, 14, 15]


@pytest.mark.parametrize(("batch_size", "train", "held_out"), [(2, [2] * 5 + [1], [2, 2, 1]), (8, [8, 3], [5])])
def test_the_last_batch_is_smaller_and_not_dropped(
    many_ST: Tensor, batch_size: int, train: list[int], held_out: list[int]
) -> None:
    data = activations_of(many_ST, batch_size).data_module(seed=7)
    for loader, sizes in ((data.train_dataloader(), train), (data.val_dataloader(), held_out)):
        assert len(loader) == len(sizes)
        assert [len(rows_B) for rows_B in loader] == sizes


def test_every_batch_replays_the_layers_own_arguments(model: PreTrainedModel, tokens_ST: Tensor) -> None:
    chain = chain_of(model, tokens_ST, 5)
    for window in partition(model):
        chain.dense_pass(window)
        data = Activations.from_chain(chain).data_module(seed=7)
        batches = [
            data.transfer_batch_to_device(batch, CPU.device, 0)
            for loader in (data.train_dataloader(), data.val_dataloader())
            for batch in loader
        ]
        assert [len(batch.inputs_BTD) for batch in batches] == [2, 2, 1, 1]
        for batch in batches:
            outputs_BTD = window(batch.inputs_BTD, batch.calls)
            torch.testing.assert_close(outputs_BTD, batch.targets_BTD, rtol=1e-5, atol=1e-5)
        chain.advance(window)


def test_batches_can_be_trained_on(tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    chain = chain_of(model, tokens_ST, 4)
    window = partition(model)[0].requires_grad_(True)
    chain.dense_pass(window)
    data = Activations.from_chain(chain).data_module(seed=7)
    batch = data.transfer_batch_to_device(next(iter(data.train_dataloader())), CPU.device, 0)
    assert not batch.targets_BTD.requires_grad and not batch.targets_BTD.is_inference()
    (window(batch.inputs_BTD, batch.calls) - 2 * batch.targets_BTD).square().mean().backward()
    assert all(parameter.grad is not None for parameter in window.parameters())


def test_the_unit_is_the_median_over_calibration_tokens_of_the_energy_of_the_dense_update(many_ST: Tensor) -> None:
    activations = activations_of(many_ST)
    updates = (activations.targets_STD - activations.inputs_STD).double().numpy()
    energies = np.sort((updates[:11] ** 2).mean(-1), axis=None)
    assert activations.unit() == pytest.approx(energies[(11 * 12 - 1) // 2], rel=1e-5)
    activations.energies_ST[11:] *= 100  # held-out samples do not set the unit
    activations.energies_ST[3, :9] *= 1e8  # nor do massive activations
    assert activations.unit() == pytest.approx(energies[(11 * 12 - 1) // 2], rel=0.5)
    activations.energies_ST[:, ::2] = 0  # a window that does nothing at most tokens
    activations.energies_ST[:, 1] = 0
    assert activations.unit() == pytest.approx(activations.energies_ST[:11].double().mean().item())


def test_a_token_without_a_finite_embedding_is_named_with_its_first_place() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[9, 3] = float("nan")
    tokens_ST = torch.full((5, 8), 4)
    tokens_ST[3, 6], tokens_ST[4, 1] = 9, 9
    with pytest.raises(NotFinite, match=r"token id 9 is not finite \(first in calibration sample 3, position 6 "):
        chain_of(model, tokens_ST, 4)
    with pytest.raises(NotFinite, match=r"first in held-out sample 0, position 6 .*another copy of the model"):
        chain_of(model, tokens_ST, 3)


def test_padding_is_left_out_by_places_that_no_device_has_to_be_asked_for(tokens_ST: Tensor) -> None:
    valid_BT = torch.tensor([[True, True, False], [True, False, False]])
    places_N = places_of(valid_BT, CPU.device)
    assert places_N.tolist() == [0, 1, 3] and places_of(torch.ones(2, 3, dtype=torch.bool), CPU.device) is None
    by_token = torch.arange(12).view(2, 3, 2)
    placed = Batch(by_token, by_token, [], by_token[..., 0], valid_BT.to("meta"), 1.0, places_N)
    masked = Batch(by_token, by_token, [], by_token[..., 0], valid_BT)
    assert placed.num_tokens == masked.num_tokens == 3
    assert placed.text(by_token).tolist() == masked.text(by_token).tolist() == [[0, 1], [2, 3], [6, 7]]
