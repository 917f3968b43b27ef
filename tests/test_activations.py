"""The chain holds the dense model's own hidden states; held-out samples judge and never teach."""

import numpy as np
import torch
from conftest import CPU, tiny_model
from transformers import PreTrainedModel

from lit_recon.activations import ActivationDataModule, Chain
from lit_recon.blocks import Decoder, observed
from lit_recon.windows import partition


def make_chain(model: PreTrainedModel, tokens_ST: torch.Tensor, *, num_samples: int = 4, batch_size: int = 3) -> Chain:
    """A chain at the first window."""
    decoder = Decoder(model, CPU.device)
    return Chain(decoder, tokens_ST, num_samples=num_samples, batch_size=batch_size, compute=CPU)


def test_targets_are_the_dense_models_hidden_states_at_each_depth(
    model: PreTrainedModel, tokens_ST: torch.Tensor
) -> None:
    hidden: list[torch.Tensor] = []
    chain = make_chain(model, tokens_ST, batch_size=6, num_samples=6)
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out: hidden.append(out[0] if isinstance(out, tuple) else out))
        for layer in chain.decoder.layers
    ]
    model(tokens_ST, use_cache=False)
    for hook in hooks:
        hook.remove()
    for window, expected_STD in zip(partition(model), list(hidden), strict=True):
        chain.dense_pass(window, observed([], lambda *_: None))
        assert torch.equal(chain.targets_STD, expected_STD)
        chain.advance()
        assert torch.equal(chain.inputs_STD, expected_STD)


def test_statistics_see_every_calibration_sample_once_and_no_held_out_one(tokens_ST: torch.Tensor) -> None:
    model = tiny_model("llama")
    chain = make_chain(model, tokens_ST, num_samples=4, batch_size=3)
    window = partition(model)[0]
    matrix = window.matrices()[0]
    rows: list[int] = []
    chain.dense_pass(window, observed([matrix], lambda _, inputs_NI: rows.append(len(inputs_NI))))
    assert rows == [3 * 24, 1 * 24]


def test_training_batches_are_a_seeded_permutation_of_the_calibration_samples(tokens_ST: torch.Tensor) -> None:
    chain = make_chain(tiny_model("llama"), tokens_ST, num_samples=5)

    def epochs(seed: int) -> list[list[int]]:
        loader = ActivationDataModule(chain, batch_size=2, seed=seed).train_dataloader()
        order = []
        for _ in range(2):
            batches = [tokens for tokens, *_ in loader]
            assert [len(batch) for batch in batches] == [2, 2, 1]
            order.append([tokens_ST.tolist().index(row) for row in torch.cat(batches).tolist()])
        return order

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert first != second
    assert epochs(0) == [first, second]
    assert epochs(1) != [first, second]


def test_validation_batches_are_the_held_out_samples_with_the_arguments_of_their_shape(
    tokens_ST: torch.Tensor,
) -> None:
    chain = make_chain(tiny_model("llama"), tokens_ST, num_samples=3)
    data = ActivationDataModule(chain, batch_size=2, seed=0)
    batches = list(data.val_dataloader())
    assert torch.equal(torch.cat([inputs for _, inputs, _ in batches]), chain.inputs_STD[3:])
    batch = data.transfer_batch_to_device(batches[0], CPU.device, 0)
    window = partition(tiny_model("llama"))[0]
    torch.testing.assert_close(window(batch.inputs_BTD, batch.calls), chain.outputs(window, slice(3, 5)))


def test_the_unit_of_errors_is_the_variance_around_the_mean_of_each_feature(tokens_ST: torch.Tensor) -> None:
    chain = make_chain(tiny_model("llama"), tokens_ST, num_samples=4)
    chain.targets_STD = torch.randn(6, 24, 32, generator=torch.Generator().manual_seed(0)) + torch.arange(32)
    rows = chain.targets_STD[:4].reshape(-1, 32).double().numpy()
    expected = np.mean((rows - rows.mean(0)) ** 2)
    assert abs(chain.target_variance() - expected) < 1e-5 * expected
