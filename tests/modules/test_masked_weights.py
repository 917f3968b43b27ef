"""The module of the default run: its steps, its schedule and its masks."""

import inspect
from collections.abc import Callable
from functools import partial
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, chain_of, configuration, fitter, masks_of, module, pruned_window, trainer, weights
from hydra.utils import instantiate
from torch import Tensor

from lit_recon.activations.datamodule import Activations, Batch
from lit_recon.activations.gram import GramSums, NormalEquations, PairedSums, QuadraticError
from lit_recon.data.packing import PADDING
from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import partition
from lit_recon.modules.least_squares import LeastSquares
from lit_recon.modules.masked_weights import MaskedWeights, zero_removed, zeroing_mask
from lit_recon.modules.schedules import constant_with_warmup, cosine_with_warmup, linear_with_warmup
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner, prune
from lit_recon.reconstruction.fit_settings import RETRY_RATES


def rates(num_warmup_steps: int, num_training_steps: int, schedule: Callable = linear_with_warmup) -> list[float]:
    """The learning rate of each training step, for an optimizer with rate 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, num_warmup_steps, num_training_steps)
    used = []
    for _ in range(num_training_steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == (schedule is constant_with_warmup), (
        "nothing is left of the rate after the last step"
    )
    return used


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        (1, [1 / 2, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]),
        (2, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
    ],
)
def test_the_rate_rises_to_its_peak_and_falls_along_straight_lines(warmup: int, expected: list[float]) -> None:
    assert rates(warmup, 6) == pytest.approx(expected)


def test_the_rate_falls_along_half_a_cosine_or_stays() -> None:
    root = sqrt(2)
    expected = [1 / 2, 1, (2 + root) / 4, 1 / 2, (2 - root) / 4]
    assert rates(1, 5, cosine_with_warmup) == pytest.approx(expected)
    assert rates(2, 5, constant_with_warmup) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


@pytest.mark.parametrize("schedule", [linear_with_warmup, cosine_with_warmup, constant_with_warmup])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 2), (2, 16), (20, 200)])
def test_no_step_has_rate_zero_and_one_has_the_full_rate(schedule: Callable, warmup: int, steps: int) -> None:
    used = rates(warmup, steps, schedule)
    assert min(used) > 0 and max(used) == 1 and used.index(1) == warmup


class Counting(torch.optim.AdamW):
    """Counts its steps, and remembers the rate of each and what the gradients were then."""

    made: list["Counting"] = []

    def __init__(self, *arguments: object, **settings: object) -> None:
        super().__init__(*arguments, **settings)
        self.rates: list[float] = []
        self.gradients: list[dict[int, Tensor]] = []
        Counting.made.append(self)

    def step(self, closure: Callable) -> object:
        loss = closure()  # Lightning's: forward, backward and the module's on_before_optimizer_step
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.rates.append(self.param_groups[0]["lr"])
        self.gradients.append({id(parameter): parameter.grad.clone() for parameter in parameters})
        super().step()
        return loss


@pytest.fixture(autouse=True)
def no_earlier_optimizers() -> None:
    Counting.made.clear()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_epochs": 1}, 3),
        ({"max_epochs": 2}, 6),
        ({"max_epochs": 1, "accumulate_grad_batches": 2}, 2),  # of two batches, and of the one that is left
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 2),
        ({"max_epochs": 3, "max_steps": 4}, 4),
        ({"max_epochs": -1, "max_steps": 5}, 5),
        ({"max_epochs": -1, "max_steps": 3, "accumulate_grad_batches": 2}, 3),
        ({"max_epochs": 1, "accumulate_grad_batches": 3}, 1),
        ({"max_epochs": 1, "accumulate_grad_batches": 5}, 1),  # more than there are
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 6),  # each epoch ends with a step
        ({"max_epochs": 2, "max_steps": 3, "accumulate_grad_batches": 2}, 3),
        ({"max_epochs": 2, "max_steps": 9}, 6),
    ],
    ids=str,
)
def test_the_optimizer_makes_as_many_steps_as_configured_and_the_schedule_spans_them(
    tokens_ST: Tensor, tmp_path: Path, settings: dict, expected: int
) -> None:
    more_ST = torch.cat([tokens_ST, tokens_ST.flip(1)])
    data, window, masks = pruned_window(tiny_model("llama"), more_ST[:8], num_samples=6)  # three batches of two
    make = module(optimizer=partial(Counting, lr=1e-2), warmup=0.0)
    result = fitter(tmp_path, make, **settings).fit(window, masks, data)
    optimizer = Counting.made[0]  # of the first try
    assert len(optimizer.rates) == result.steps == expected
    assert optimizer.rates == pytest.approx([1e-2 * (expected - step) / expected for step in range(expected)])


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
        partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True),
        partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
    ],
    ids=["AdamW", "fused AdamW", "momentum"],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pruned_weights_stay_exactly_zero_while_the_others_train(
    tokens_ST: Tensor, tmp_path: Path, kind: str, optimizer: Callable
) -> None:
    data, window, masks = pruned_window(tiny_model(kind), tokens_ST)
    before = weights(window)
    assert fitter(tmp_path, module(optimizer=optimizer)).fit(window, masks, data).accepted
    for name, matrix in zip(masks, window.matrices(), strict=True):
        mask = masks[name]
        assert torch.count_nonzero(matrix.weight[~mask]) == 0, name
        assert 0.49 < 1 - mask.float().mean() < 0.51
    for name, parameter in window.named_parameters():
        changes = (parameter != before[name]).sum() / (before[name] != 0).sum().clamp(min=1)
        assert changes > 0.9 or name.endswith("k_proj.bias") or parameter.dim() == 1, name


def test_gradients_of_pruned_weights_are_zero_when_the_optimizer_steps(tokens_ST: Tensor, tmp_path: Path) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST)
    make = module(optimizer=partial(Counting, lr=1e-2))
    fitter(tmp_path, make, accumulate_grad_batches=2).fit(window, masks, data)
    (optimizer,) = Counting.made
    assert len(optimizer.gradients) == 4
    for gradients in optimizer.gradients:
        for name, matrix in zip(masks, window.matrices(), strict=True):
            gradient = gradients[id(matrix.weight)]
            assert torch.count_nonzero(gradient[~masks[name]]) == 0, name
            assert torch.count_nonzero(gradient[masks[name]]) > 0, name


def test_one_step_goes_along_the_masked_gradient_of_the_loss_that_was_asked_for(
    tokens_ST: Tensor, tmp_path: Path
) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST, num_samples=2)  # a single batch
    before, seen = weights(window), []

    def cubic(outputs_ND: Tensor, targets_ND: Tensor, *, energies_N: Tensor, unit: float) -> Tensor:
        assert outputs_ND.shape == targets_ND.shape == (2 * 24, 32) and energies_N.shape == (2 * 24,)
        seen.append(unit)
        return (outputs_ND - targets_ND).abs().pow(3).mean(-1)

    make = module(optimizer=partial(torch.optim.SGD, lr=1e-2), scheduler=None, loss=cubic)
    result = fitter(tmp_path, make, max_epochs=1).fit(window, masks, data)
    assert result.accepted and result.steps == 1
    assert set(seen) == {data.unit()}
    after = weights(window)
    for name, parameter in window.named_parameters():
        parameter.data.copy_(before[name])
    window.requires_grad_(True)
    outputs_BTD = window(data.inputs_STD[:2], data.batching.calls(torch.arange(2)))
    loss = (outputs_BTD - data.targets_STD[:2]).abs().pow(3).mean()
    gradients = torch.autograd.grad(loss, list(window.parameters()))
    for (name, value), gradient in zip(before.items(), gradients, strict=True):
        mask = masks.get(f"model.layers.0.{name.removeprefix('layers.0.')}", torch.ones_like(value))
        torch.testing.assert_close(after[name], value - 1e-2 * gradient * mask, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_of_the_weights_that_are_left_are_clipped_also_with_a_fused_optimizer(
    tokens_ST: Tensor, tmp_path: Path, precision: str
) -> None:
    data, window, masks = pruned_window(tiny_model("llama"), tokens_ST, num_samples=2)  # a single batch
    before = weights(window)
    make = module(optimizer=partial(torch.optim.SGD, lr=1.0, fused=True), scheduler=None)
    settings = {"max_epochs": 1, "precision": precision, "gradient_clip_val": 1e-3}
    assert fitter(tmp_path, make, **settings).fit(window, masks, data).accepted
    change = sum((parameter - before[name]).square().sum() for name, parameter in window.named_parameters())
    assert change.sqrt().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_least_squares_finds_the_minimiser_also_in_a_run_of_16_bits(tmp_path: Path, precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    different_NI = torch.randn(30, 32, generator=generator) * torch.logspace(0, -2, 32)
    rows_NI = different_NI[torch.randint(0, 30, (256,), generator=generator)]  # few tokens: G is singular
    window = partition(tiny_model("llama"), by="matrix")[0]
    window.open()
    sums = GramSums.zero(32, CPU.device)
    sums.add(rows_NI)
    equations = NormalEquations.from_sums(window, *[[PairedSums.of_one(sums)]] * 2)
    targets_NO = (rows_NI @ window.weight.T).double().numpy()
    mask = torch.rand(window.weight.shape, generator=generator) < 0.5
    window.weight.mul_(mask)
    make = instantiate(configuration("module=least_squares").module, _convert_="all")
    settings = {"precision": precision, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}  # for gradients
    make = partial(make, damping=1e-4)  # what is left of the error is then the minimum's
    result = fitter(tmp_path, make, **settings).fit(window, {window.matrix.name: mask}, equations)
    assert torch.count_nonzero(window.weight[~mask]) == 0
    left = 0.0
    for kept, target_N in zip(mask.numpy(), targets_NO.T, strict=True):
        inputs = rows_NI.double().numpy()[:, kept]
        left += ((inputs @ np.linalg.lstsq(inputs, target_N, rcond=None)[0] - target_N) ** 2).sum()
    unit = np.sort((targets_NO[::4] ** 2).mean(1))[31]  # the lower middle of the 64 rows that are kept of a batch
    best = left / targets_NO.size / unit
    assert result.accepted and best < 0.6 * result.relative_error_before, "there is much to gain"
    assert result.relative_error_after == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize(("damping", "needed"), [(0.01, 1.0), (0.1, 1.0), (0.5, 0.5), (2, 2)])
def test_damping_grows_tenfold_where_the_gram_matrix_is_not_positive_definite(damping: float, needed: float) -> None:
    window = partition(tiny_model("llama"), by="matrix")[0]
    window.open()
    outputs, inputs = window.weight.shape
    gram_II = torch.eye(inputs)
    gram_II[0, 1] = gram_II[1, 0] = 1.3  # eigenvalues 2.3 and -0.3
    mask = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(0)) < 0.5
    cross_OI, one = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)), torch.ones(())
    solver = LeastSquares(window, {window.matrix.name: mask}, 1.0, damping=damping)
    solver.training_step(QuadraticError(gram_II[None], cross_OI[None], one, one, []), 0)
    assert solver.note == (
        "" if needed == damping else "damped by 1: its Gram matrix is not positive definite in float32"
    )
    assert torch.isfinite(window.weight).all()


def called(make: object) -> tuple[object, dict]:
    """What is called, and the arguments that it is given already; of what is no partial call, itself."""
    return (make.func, make.keywords) if isinstance(make, partial) else (make, {})


def test_the_defaults_of_the_constructor_and_of_retries_are_those_of_the_configuration() -> None:
    configured = instantiate(configuration().module, _convert_="all")
    assert configured.func is MaskedWeights
    assert tuple(configured.keywords.pop("retry_rates")) == RETRY_RATES
    parameters = inspect.signature(MaskedWeights).parameters.items()
    defaults = {name: one.default for name, one in parameters if one.default is not one.empty}
    found, expected = ({name: called(one) for name, one in each.items()} for each in (defaults, configured.keywords))
    assert found == expected


class Twice(MaskedWeights):
    """Looks at the layers in every training step: their modes, and whether they compute the same twice."""

    modes: list[bool]
    equal: list[bool]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.modes += [part.training for part in self.window.modules()]
        self.equal.append(torch.equal(self(batch), self(batch)))
        return super().training_step(batch, batch_idx)


def test_dropout_stays_off_while_a_window_trains_also_after_validation(tokens_ST: Tensor) -> None:
    model = tiny_model("opt")
    assert model.config.dropout == 0.1, "the test needs dropout"
    data, window, masks = pruned_window(model, tokens_ST)
    window.requires_grad_(True)
    made = type("Watched", (Twice,), {"modes": [], "equal": []})
    lightning_module = module(cls=made)(window, masks, 1.0)
    lightning_module.train()  # as if the model had been loaded for training
    trainer(max_epochs=2)(logger=False).fit(lightning_module, datamodule=data.data_module(seed=0))
    assert len(made.equal) == 4 and all(made.equal)
    assert not any(made.modes)


def trained_in_batches(tokens_ST: Tensor, num_samples: int, batch_size: int, make: Callable) -> tuple[Tensor, Tensor]:
    """Weights of a window before and after an epoch of four samples per step, accumulated over smaller batches."""
    model = tiny_model("llama")
    chain = chain_of(model, tokens_ST, num_samples, batch_size=batch_size)
    window = partition(model)[0]
    masks = masks_of(Pruner(Magnitude(), Unstructured(sparsity=0.5), chain), window)
    prune(window, masks)
    before = torch.cat([parameter.detach().flatten().clone() for parameter in window.parameters()])
    data = Activations.from_chain(chain)
    window.requires_grad_(True)
    accumulated = trainer(max_epochs=1, accumulate_grad_batches=4 // batch_size, num_sanity_val_steps=0)
    accumulated(logger=False).fit(make(window, masks, data.unit()), datamodule=data.data_module(seed=0))
    return before, torch.cat([parameter.detach().flatten() for parameter in window.parameters()])


@pytest.mark.parametrize(
    "optimizer",
    [partial(torch.optim.AdamW, lr=1e-3, eps=1e-12), partial(torch.optim.SGD, lr=0.1)],
    ids=["AdamW", "SGD"],
)
@pytest.mark.parametrize(
    ("num_samples", "is_padded"),
    [(17, False), (16, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((16, False), (18, False)))],
)
def test_accumulation_padding_and_incomplete_batches_change_nothing(
    num_samples: int, is_padded: bool, optimizer: Callable
) -> None:
    tokens_ST = torch.randint(3, 64, (num_samples + 2, 24), generator=torch.Generator().manual_seed(1))
    if is_padded:
        for row in range(len(tokens_ST)):
            tokens_ST[row, 4 + 5 * row % 21 :] = PADDING
    make = module(optimizer=optimizer)
    before, whole = trained_in_batches(tokens_ST, num_samples, 4, make)
    moved = (whole - before).norm()
    assert moved > 1e-3
    for batch_size in (2, 1):
        _, accumulated = trained_in_batches(tokens_ST, num_samples, batch_size, make)
        assert (accumulated - whole).norm() < 1e-4 * moved, f"batches of {batch_size}"


def test_a_batch_weighs_as_many_tokens_as_it_has_and_a_full_one_exactly_one() -> None:
    tokens_ST = torch.randint(3, 64, (7, 8), generator=torch.Generator().manual_seed(1))
    for padding, expected in ((8, [1.0, 1.0, 0.5]), (4, [12 / 12.8, 16 / 12.8, 4 / 12.8])):
        padded_ST = tokens_ST.clone()
        padded_ST[::4, padding:] = PADDING  # of five calibration samples the first and the last: 6.4 tokens on average
        chain = chain_of(tiny_model("llama"), padded_ST, 5)
        chain.dense_pass(partition(tiny_model("llama"))[0])
        assert [batch.weight for batch in Activations.from_chain(chain).batches(0, 5)] == pytest.approx(expected)


@pytest.mark.parametrize(("device_type", "dtype"), [("cpu", torch.float32), ("cuda", torch.bool)])
def test_what_a_mask_removes_is_zeroed_in_either_form(device_type: str, dtype: torch.dtype) -> None:
    kept_OI = torch.tensor([[True, False, True], [False, True, False]])
    found = zeroing_mask(kept_OI, torch.float32, device_type)
    assert found.dtype == dtype
    gradient_OI = torch.tensor([[1.0, 2.0, -3.0], [4.0, -5.0, 6.0]])
    zero_removed(gradient_OI, found)
    assert gradient_OI.tolist() == [[1, 0, -3], [0, -5, 0]]
