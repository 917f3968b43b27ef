"""An evaluation: load, verify, measure all states side by side, run tasks, add the result to the record, show it."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

from rich.markup import escape
from transformers import PreTrainedModel

from lit_recon.evaluate.configure import Evaluation
from lit_recon.evaluate.output import table
from lit_recon.evaluate.perplexity import EvaluationProtocol, perplexity_of, share_recovered
from lit_recon.evaluate.progress import EvaluationProgress
from lit_recon.evaluate.record import add
from lit_recon.evaluate.rounds import choose_rounds
from lit_recon.evaluate.side_by_side import SideBySide, State
from lit_recon.evaluate.whole_models import continuations, drift, scores
from lit_recon.model.decoder import Decoder
from lit_recon.model.loading import LanguageModel
from lit_recon.model.verify import verify
from lit_recon.pruning.masks import Masks
from lit_recon.system.clock import Clock
from lit_recon.system.command_line import Refusal, in_words, shortened, stop
from lit_recon.system.console import Console
from lit_recon.system.memory import peak_memory_bytes
from lit_recon.system.versions import versions

PHASES = ("load", "verify", "measure", "drift", "prompts", "tasks")
DRIFT_WINDOWS = 16  # at most, of which each matrix is multiplied thrice more
_SHOWN = 5e-4  # seconds


def run(evaluation: Evaluation, console: Console) -> None:
    """Do it all, and add the result to the record.

    Raises:
        Refusal: What only the models' weights show; nothing has been written then.
        SystemExit: With status 1, where the result is shown but cannot be written.
    """
    clock = Clock(PHASES)
    try:
        states = _states(evaluation, clock)
        for name, text in _described(evaluation, states).items():
            console.print(f"[bold]{name:12}[/bold]{escape(text)}", highlight=False, soft_wrap=True)
        found = _on_text(evaluation, states, clock, console) if evaluation.text is not None else {}
        with clock.phase("prompts"):
            found["continuations"] = continuations(evaluation, states, console) if evaluation.prompts else None
        with clock.phase("tasks"):
            found["tasks"] = scores(evaluation, states, console) if evaluation.tasks is not None else None
    except ValueError as error:
        raise Refusal(str(error)) from error
    entry = _entry(evaluation, found, clock)
    try:
        add(evaluation.record, entry)
    except (OSError, ValueError) as error:  # a full disk, hours after it was looked at
        console.print(table(entry, None))
        stop(f"{evaluation.record}: the numbers above could not be added ({in_words(error)}).", status=1)
    console.print(table(entry, evaluation.record))


def _states(evaluation: Evaluation, clock: Clock) -> dict[str, State]:
    """The models that are measured, loaded and verified, in their states.

    Raises:
        ValueError: A model cannot be loaded or run.
    """
    with clock.phase("load"):
        model = evaluation.subject.model.load()
        dense = evaluation.dense.load() if evaluation.dense is not None else None
    with clock.phase("verify"):
        if evaluation.text is not None:
            tokens_ST = evaluation.text.windows.tokens_ST
            for one in _unlike(model, dense):
                verify(one, tokens_ST[:1], lengths={"data.evaluation_length": tokens_ST.shape[1]})
    device, states = evaluation.compute.device, {}
    if dense is not None:
        decoder = Decoder(dense, device)
        states["dense"] = State(decoder)
        if evaluation.masks is not None:
            masks = Masks.load(evaluation.masks)
            _check_masks(masks, dense, evaluation)
            states["pruned"] = State(decoder, partial(masks.applied, changed=None))
    return states | {"checkpoint": State(Decoder(model, device))}


def _unlike(model: PreTrainedModel, dense: PreTrainedModel | None) -> list[PreTrainedModel]:
    """The models that are called in other ways: what holds of layers holds in another model of the class."""
    return [model] if dense is None or type(dense) is type(model) else [model, dense]


def _check_masks(masks: Masks, dense: PreTrainedModel, evaluation: Evaluation) -> None:
    """Raise a ValueError where the masks of a run do not fit the dense model."""
    shapes = {name: tuple(parameter.shape) for name, parameter in dense.named_parameters()}
    other = [name for name in masks if shapes.get(name) != tuple(masks[name].shape)]
    if other:
        raise ValueError(
            f"dense={evaluation.dense_name}: {len(other)} masks of the run do not fit its matrices, such as "
            f"{other[0]}; give the model that the run has pruned."
        )


def _described(evaluation: Evaluation, states: Mapping[str, State]) -> dict[str, str]:
    """What is evaluated, for the terminal."""
    compute, dense = evaluation.compute, evaluation.dense
    without = "not known; dense=<model> compares with it" if dense is None else _model_line(dense, states["dense"])
    shown = {
        "checkpoint": _model_line(evaluation.subject.model, states["checkpoint"]),
        "dense": without,
        "compute": f"{compute.device.type}, {compute.precision}, one layer at a time",
    }
    if evaluation.text is not None:
        shown["text"] = evaluation.text.protocol.describe()
    if evaluation.tasks is not None:
        shown["tasks"] = shortened(", ".join(evaluation.tasks.names), 200)
    return shown


def _model_line(model: LanguageModel, state: State) -> str:
    parameters = sum(parameter.numel() for parameter in state.decoder.model.parameters())
    return f"{shortened(model.describe(), 100)}, {parameters / 1e6:.1f} M parameters"


def _on_text(evaluation: Evaluation, states: Mapping[str, State], clock: Clock, console: Console) -> dict[str, Any]:
    """Perplexity, agreement and drift, as the record has them.

    Raises:
        ValueError: Not one window fits into memory, or the models have other matrices.
    """
    text, settings = evaluation.text, evaluation.settings
    assert text is not None
    shape = (len(text.windows.tokens_ST), text.windows.tokens_ST.shape[1])
    decoders = [state.decoder for state in states.values()]
    rounds = choose_rounds(decoders, shape, batch_size=text.batch_size, limit=evaluation.limit)
    sides = SideBySide(
        states=states,
        compute=evaluation.compute,
        batch_size=rounds.batch_size,
        round_size=rounds.size,
        agrees=evaluation.agrees,
    )
    found: dict[str, Any] = {}
    measures = settings["perplexity"] or evaluation.agrees
    depth = len(states["checkpoint"].decoder.layers)
    total = measures * sides.num_ticks(text.windows) + evaluation.drifts * depth
    with EvaluationProgress(console, total) as progress:
        if measures:
            with clock.phase("measure"):
                measured = replace(sides, tick=progress.tick).measure(text.windows)
            found["perplexity"] = _perplexity(text.protocol, measured.nats) if settings["perplexity"] else None
            found["agreement"] = measured.agreement.as_json() if measured.agreement is not None else None
        if evaluation.drifts:
            with clock.phase("drift"):
                found["drift"] = drift(
                    states,
                    text.windows[: min(rounds.size, DRIFT_WINDOWS)].tokens_ST,
                    evaluation.compute,
                    batch_size=rounds.batch_size,
                    tick=progress.tick,
                )
    return found


def _entry(evaluation: Evaluation, found: Mapping[str, Any], clock: Clock) -> dict[str, Any]:
    """The entry of the record."""
    spent = {name: value for name, value in clock.seconds.items() if value >= _SHOWN}
    seconds = {name: round(value, 3) for name, value in (spent | {"total": clock.total()}).items()}
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checkpoint": evaluation.subject.name,
        "dense": evaluation.dense_name,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(evaluation.compute.device),
        "versions": versions(),
        "settings": evaluation.settings,
        **{name: found.get(name) for name in ("perplexity", "agreement", "tasks", "continuations", "drift")},
    }


def _perplexity(protocol: EvaluationProtocol, nats: Mapping[str, float]) -> dict[str, Any]:
    """Perplexity of all states, with its protocol and the share of the gap that was won back."""
    perplexity = {name: perplexity_of(value) for name, value in nats.items()}
    gaps = {
        name: share_recovered(values["dense"], values["pruned"], values["checkpoint"]) if "pruned" in values else None
        for name, values in (("gap_recovered", perplexity), ("gap_recovered_nats", nats))
    }
    return {"protocol": asdict(protocol), "nats": dict(nats), "perplexity": perplexity, **gaps}
