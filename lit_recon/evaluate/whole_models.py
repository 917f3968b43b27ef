"""Continuations, tasks and drift of the states of a model, as the record has them.

Prompts and tasks need a whole model on the device, in its own dtype; the pruned one is the dense model, all of whose
layers are pruned while it runs, which takes the memory of its matrices.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from lit_recon.evaluate.configure import Evaluation
from lit_recon.evaluate.continuations import Continuation, continuations_as_json, continue_prompts, num_steps
from lit_recon.evaluate.drift import drift_of_layers
from lit_recon.evaluate.harness import TaskResult, run_tasks, tasks_as_json
from lit_recon.evaluate.progress import EvaluationProgress
from lit_recon.evaluate.side_by_side import State, Tick
from lit_recon.system.console import Console
from lit_recon.system.device import Compute
from lit_recon.system.units import in_gb

log = logging.getLogger(__name__)


def continuations(evaluation: Evaluation, states: Mapping[str, State], console: Console) -> list[dict[str, Any]]:
    """How all states continue the prompts.

    Raises:
        ValueError: The device has not the memory.
    """
    made: dict[str, list[Continuation]] = {}
    fitting = {name: state for name, state in states.items() if _fits(evaluation, name, state)}
    steps = num_steps(evaluation.prompts, evaluation.decoding)
    with EvaluationProgress(console) as progress:
        progress.expect(steps * len(fitting))
        for name, state in fitting.items():
            with _whole(state):
                made[name] = continue_prompts(
                    state.decoder.model,
                    evaluation.tokenizer,
                    evaluation.prompts,
                    evaluation.decoding,
                    device=evaluation.compute.device,
                    advanced=partial(progress.tick, f"prompts, {name}"),
                )
    return continuations_as_json(evaluation.prompts, made)


def _fits(evaluation: Evaluation, name: str, state: State) -> bool:
    """Whether a model can be in a state as a whole; only the pruned one is not mapped from files."""
    needed = sum(matrix.nbytes for matrix in state.decoder.layers.parameters())
    if name != "pruned" or evaluation.limit is None or needed <= evaluation.limit:
        return True
    log.info("the pruned model continues no prompts: all of it takes %s, beyond memory_limit", in_gb(needed))
    return False


@contextmanager
def _whole(state: State) -> Iterator[None]:
    """A context in which all layers of a model are in a state."""
    decoder = state.decoder
    with ExitStack() as stack:
        for index, layer in enumerate(decoder.layers):
            stack.enter_context(state.around(layer, f"{decoder.prefix}.{index}"))
        yield


def scores(evaluation: Evaluation, states: Mapping[str, State], console: Console) -> dict[str, Any]:
    """Scores of the checkpoint, and of the dense model where there is one, in the tasks.

    Raises:
        ValueError: The harness cannot run them.
    """
    tasks = evaluation.tasks
    assert tasks is not None
    results: list[TaskResult] = []
    names = [name for name in ("checkpoint", "dense") if name in states]
    with EvaluationProgress(console) as progress:
        for name in names:
            # the second model is asked what the first was
            results += run_tasks(
                states[name].decoder.model,
                evaluation.tokenizer,
                tasks,
                state=name,
                device=evaluation.compute.device,
                batch_size=evaluation.decoding.batch_size,
                expect=(lambda requests: progress.expect(requests * len(names))) if not results else _ignore,
                answered=partial(progress.tick, f"tasks, {name}"),
            )
    return tasks_as_json(results, tasks)


def _ignore(requests: int) -> None:
    """What is known already."""


def drift(
    states: Mapping[str, State], tokens_ST: Tensor, compute: Compute, *, batch_size: int, tick: Tick
) -> list[dict[str, Any]]:
    """Drift of each matrix of the checkpoint.

    Args:
        states: Among them "dense" and "checkpoint".
        tokens_ST: Windows of text.
        compute: Device and precision.
        batch_size: Windows per pass.
        tick: Is told of each layer.

    Raises:
        ValueError: The models have other matrices.
    """
    dense, sparse = (states[name].decoder.model for name in ("dense", "checkpoint"))
    found = []
    for index, layer in enumerate(drift_of_layers(dense, sparse, tokens_ST, compute, batch_size=batch_size)):
        found += [matrix.as_json() for matrix in layer]
        tick(f"drift of layer {index + 1}")
    return found
