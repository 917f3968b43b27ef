"""Agreement with the dense model, against the models' own logits and hidden states, all at once."""

from functools import partial

import pytest
import torch
from conftest import CPU
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.data.packing import PADDING
from lit_recon.evaluate.side_by_side import Measured, SideBySide, State
from lit_recon.evaluate.windows import TextWindows, cut
from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import Decoder
from lit_recon.pruning.masks import Masks


def noisy(shape: str) -> PreTrainedModel:
    """A tiny model with other weights."""
    model = tiny_model(shape)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model


def measured(
    windows: TextWindows, *, round_size: int = 2, agrees: bool = True, masks: Masks | None = None, shape: str = "llama"
) -> Measured:
    """A noisy model next to its original."""
    dense = Decoder(tiny_model(shape), CPU.device)
    states = {"dense": State(dense), "checkpoint": State(Decoder(noisy(shape), CPU.device))}
    if masks is not None:
        states["pruned"] = State(dense, partial(masks.applied, changed=None))
    side_by_side = SideBySide(states=states, compute=CPU, batch_size=2, round_size=round_size, agrees=agrees)
    return side_by_side.measure(windows)


def own_logits(model: PreTrainedModel, windows: TextWindows) -> list[tuple[Tensor, Tensor]]:
    """Logits of the predicted tokens, in float64, and these tokens, window by window."""
    found = []
    for row_T, first in zip(windows.tokens_ST, windows.first_S, strict=True):
        row_T = row_T[row_T != PADDING]
        with torch.no_grad():
            logits_TV = model(row_T[None], use_cache=False).logits[0].double()
        found.append((logits_TV[first - 1 : -1], row_T[first:]))
    return found


CUTS = {
    "apart": {},
    "with a stride": {"stride": 10},
    "opened": {"opening": [1]},
    "opened and with a stride": {"opening": [1], "stride": 7},
}


@pytest.fixture(params=CUTS)
def windows(request: pytest.FixtureRequest) -> TextWindows:
    """Windows of random text."""
    stream_T = torch.randint(3, 64, (85,), generator=torch.Generator().manual_seed(1))
    settings: dict = {"opening": [], **CUTS[request.param]}
    return cut(stream_T, settings.pop("opening"), length=24, **settings)


def test_perplexity_is_that_of_the_models_own_loss_on_the_same_windows(windows: TextWindows) -> None:
    found = measured(windows)
    for name, model in (("dense", tiny_model("llama")), ("checkpoint", noisy("llama"))):
        total, tokens = 0.0, 0
        for row_T, first in zip(windows.tokens_ST, windows.first_S, strict=True):
            row_T = row_T[row_T != PADDING]
            labels_T = row_T.clone()
            labels_T[:first] = PADDING
            with torch.no_grad():
                loss = model(row_T[None], labels=labels_T[None], use_cache=False).loss.double().item()
            total, tokens = total + loss * (len(row_T) - first), tokens + len(row_T) - first
        assert found.nats[name] == pytest.approx(total / tokens, rel=1e-5)
        assert tokens == windows.num_tokens


def test_divergence_and_top1_are_those_of_the_models_own_logits(windows: TextWindows) -> None:
    pairs = zip(own_logits(noisy("llama"), windows), own_logits(tiny_model("llama"), windows), strict=True)
    kl, same, tokens = 0.0, 0, 0
    for (logits_CV, _), (dense_CV, _) in pairs:
        p_CV, q_CV = dense_CV.softmax(-1), logits_CV.softmax(-1)
        kl += (p_CV * (p_CV.log() - q_CV.log())).sum().item()
        same += int((logits_CV.argmax(-1) == dense_CV.argmax(-1)).sum())
        tokens += len(logits_CV)
    agreement = measured(windows).agreement
    assert agreement is not None and agreement.tokens == tokens
    assert agreement.kl == pytest.approx(kl / tokens, rel=1e-4) and kl > 0
    assert agreement.top1 == pytest.approx(same / tokens) and 0 < same < tokens


def test_errors_of_hidden_states_are_those_of_the_models_own_states() -> None:
    windows = cut(torch.randint(3, 64, (72,), generator=torch.Generator().manual_seed(1)), [], length=24)
    states: list[list[Tensor]] = [[], []]
    for found, model in zip(states, (noisy("llama"), tiny_model("llama")), strict=True):
        for layer in model.model.layers:
            layer.register_forward_hook(
                lambda _, __, out, found=found: found.append(out if isinstance(out, Tensor) else out[0])
            )
        with torch.no_grad():
            model(windows.tokens_ST, use_cache=False)
    agreement = measured(windows).agreement
    assert agreement is not None and len(agreement.hidden) == len(states[0])
    for errors, states_STD, dense_STD in zip(agreement.hidden, *states, strict=True):
        unit = dense_STD.square().mean(-1).flatten().median()
        errors_N = ((states_STD - dense_STD).square().mean(-1) / unit).flatten()
        assert errors.mean == pytest.approx(errors_N.mean().item(), rel=1e-4)
        assert errors.typical == pytest.approx(errors_N.median().item(), rel=1e-4)


def test_rounds_of_any_size_give_the_same_numbers(windows: TextWindows) -> None:
    whole, parts = measured(windows, round_size=100), measured(windows, round_size=1)
    assert parts.nats == pytest.approx(whole.nats, rel=1e-6)
    assert parts.agreement is not None and whole.agreement is not None
    assert parts.agreement.kl == pytest.approx(whole.agreement.kl, rel=1e-5)
    assert parts.agreement.hidden[-1] == pytest.approx(whole.agreement.hidden[-1], rel=1e-5)


def test_a_model_agrees_with_itself() -> None:
    windows = cut(torch.arange(3, 60), [], length=24)
    decoder = Decoder(tiny_model("llama"), CPU.device)
    states = {"dense": State(decoder), "checkpoint": State(decoder)}
    agreement = (
        SideBySide(states=states, compute=CPU, batch_size=1, round_size=2, agrees=True).measure(windows).agreement
    )
    assert agreement is not None and (agreement.kl, agreement.top1) == (0, 1)
    assert {tuple(errors) for errors in agreement.hidden} == {(0, 0)}


def test_the_pruned_state_is_the_dense_model_under_the_masks() -> None:
    windows = cut(torch.randint(3, 64, (72,), generator=torch.Generator().manual_seed(1)), [], length=24)
    pruned, name = tiny_model("llama"), "model.layers.0.mlp.up_proj.weight"
    mask = torch.rand(pruned.get_parameter(name).shape, generator=torch.Generator().manual_seed(2)) > 0.5
    pruned.get_parameter(name).mul_(mask)
    found = measured(windows, masks=Masks.pack({name: mask}), agrees=False)
    total = sum(
        torch.nn.functional.cross_entropy(*pair, reduction="sum").item() for pair in own_logits(pruned, windows)
    )
    assert found.nats["pruned"] == pytest.approx(total / windows.num_tokens, rel=1e-5)
    assert found.agreement is None and found.nats["pruned"] != found.nats["dense"]
