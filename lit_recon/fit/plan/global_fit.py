"""Estimate of the fit of all layers at once: bytes, seconds and steps."""

from collections.abc import Sequence
from typing import NamedTuple

from lit_recon.activations.chain import Chain
from lit_recon.data.source import Samples
from lit_recon.evaluate.perplexity import LOGITS_BYTES
from lit_recon.fit.job import Schedule
from lit_recon.fit.plan.layer_profile import LayerProfile
from lit_recon.fit.session import Session
from lit_recon.model.head import slice_tokens
from lit_recon.reconstruction.retraining import Retraining

_FLOAT32 = 4
_BACKWARD = 2.5  # a backward costs about two forwards, masks and optimizer half of one


class GlobalFit(NamedTuple):
    """What the fit of all layers at once will take.

    Attributes:
        own_bytes: Memory of the process, without what is mapped.
        mapped_bytes: What the teacher looks at in the model's files.
        disk_bytes: The states that are committed within it, two at a time and a third that is written.
        samples: As many forwards of a sample through all layers take the same time.
        steps: Of the optimizer.
    """

    own_bytes: int
    mapped_bytes: int
    disk_bytes: int
    samples: float
    steps: int


def steps_per_window(num_samples: int, batch_size: int, schedule: Schedule) -> int:
    """Optimizer steps of each window."""
    batches = -(-num_samples // batch_size)
    steps = schedule.epochs * -(-batches // schedule.accumulate) if schedule.epochs > 0 else schedule.max_steps
    return steps if schedule.max_steps < 0 else min(steps, schedule.max_steps)


def batches_of(num_samples: int, batch_size: int, schedule: Schedule) -> int:
    """Batches that a window is trained on, about."""
    return steps_per_window(num_samples, batch_size, schedule) * schedule.accumulate


def plan_global_fit(
    session: Session,
    profiles: Sequence[LayerProfile],
    schedule: Schedule | None,
    *,
    batch_size: int,
    resident: int,
    on_logits: int,
) -> GlobalFit:
    """Estimate the fit of all layers at once; nothing where there is none.

    Args:
        session: The model.
        profiles: What one batch of each layer showed.
        schedule: How long they are trained.
        batch_size: Samples per batch.
        resident: Memory that the process has when the walk is over.
        on_logits: What a loss on the logits takes.
    """
    retrained, passes = session.retrained, session.chain.passes
    if retrained is None or schedule is None:
        return GlobalFit(0, 0, 0, 0, 0)
    window, data = retrained.window, retrained.data
    num_samples = data.batching.num_samples
    parameters = [profile.parameters for profile in profiles]
    width = passes.decoder.model.config.get_text_config().hidden_size
    states = batch_size * passes.tokens_ST.shape[1] * width * _FLOAT32 * len(profiles)
    saved = [profile.saved_bytes for profile in profiles]
    own = resident + _FLOAT32 * sum(parameters) + sum(profile.training_bytes for profile in profiles)
    own += states + max(saved) if window.checkpoint_layers else sum(saved)
    own += on_logits if window.head else 0
    own += 4 * states if data.targets == "all states" else 0  # outputs, targets, their difference and its square
    has_teacher = data.targets != "tokens"
    own += _FLOAT32 * max(parameters) if has_teacher and profiles[0].weight_bytes < _FLOAT32 else 0  # one layer
    mapped = sum(profile.parameters * profile.weight_bytes for profile in profiles) if session.weights.files else 0
    committed = sum(profile.trained * (3 + profile.keeps_best) for profile in profiles)  # weights, moments, best state
    forwards = 1 + has_teacher + window.checkpoint_layers + _BACKWARD
    measured = 4 * passes.num_held_out * (1 + has_teacher)  # before and after, on twice as many
    return GlobalFit(
        own_bytes=own,
        mapped_bytes=mapped if has_teacher else 0,
        disk_bytes=3 * _FLOAT32 * committed,
        samples=batches_of(num_samples, batch_size, schedule) * batch_size * forwards + measured,
        steps=steps_per_window(num_samples, batch_size, schedule),
    )


def describe_global_fit(planned: GlobalFit, settings: Retraining, samples: Samples) -> str:
    """What will be done, in the words of the settings."""
    said, own = settings.describe(), samples.num_retraining_tokens
    return (
        f"all layers at once, {planned.steps} steps, {said['retraining_loss']}, on "
        f"{f'{own} other tokens' if own else 'the same tokens'}, at "
        f"{said['retraining_rate']} of the learning rate, committed every {settings.commit_every} steps"
    )


def head_bytes(chain: Chain, evaluation_tokens: int, *, has_loss: bool) -> tuple[int, int]:
    """What an evaluation takes, and a loss on the logits where there is one."""
    weight = chain.passes.decoder.model.get_output_embeddings().weight
    copied = 2 * weight.numel()  # by autocast, in 16 bits
    states = chain.inputs_STD[0, 0].numel() * evaluation_tokens * _FLOAT32
    evaluation = 4 * LOGITS_BYTES + copied + states  # logits, their softmax and two copies on the way
    tokens = slice_tokens(len(weight), chain.passes.compute.device)
    return evaluation, (copied + 8 * tokens * len(weight) * _FLOAT32) if has_loss else 0  # two slices, with gradients
