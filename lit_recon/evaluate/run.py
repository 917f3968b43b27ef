"""An evaluation: load, verify, measure all states side by side, add the result to the record, show it."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel

from lit_recon.evaluate.configure import Evaluation
from lit_recon.evaluate.output import table
from lit_recon.evaluate.perplexity import perplexity_of, share_recovered
from lit_recon.evaluate.progress import EvaluationProgress
from lit_recon.evaluate.record import add
from lit_recon.evaluate.rounds import choose_rounds
from lit_recon.evaluate.side_by_side import Measured, SideBySide, State
from lit_recon.evaluate.windows import TextWindows
from lit_recon.model.decoder import Decoder
from lit_recon.model.loading import LanguageModel
from lit_recon.model.verify import verify
from lit_recon.pruning.masks import Masks
from lit_recon.system.clock import Clock
from lit_recon.system.command_line import Refusal, in_words, shortened, stop
from lit_recon.system.memory import peak_memory_bytes
from lit_recon.system.versions import versions

PHASES = ("load", "verify", "measure")


def run(evaluation: Evaluation, console: Console) -> None:
    """Do it all, and add the result to the record.

    Raises:
        Refusal: What only the models' weights show; nothing has been written then.
        SystemExit: With status 1, where the result is shown but cannot be written.
    """
    clock = Clock(PHASES)
    try:
        states = _states(evaluation, clock)
    except ValueError as error:
        raise Refusal(str(error)) from error
    for name, text in _described(evaluation, states).items():
        console.print(f"[bold]{name:12}[/bold]{escape(text)}", highlight=False, soft_wrap=True)
    measured = _measure(evaluation, states, clock, console)
    entry = _entry(evaluation, measured, clock)
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
        for one in (model, dense):
            if one is not None and evaluation.windows is not None:
                _verify(one, evaluation.windows)
    device, states = evaluation.compute.device, {}
    if dense is not None:
        decoder = Decoder(dense, device)
        states["dense"] = State(decoder)
        if evaluation.masks is not None:
            masks = Masks.load(evaluation.masks)
            _check_masks(masks, dense, evaluation)
            states["pruned"] = State(decoder, partial(masks.applied, changed=None))
    return states | {"checkpoint": State(Decoder(model, device))}


def _verify(model: PreTrainedModel, windows: TextWindows) -> None:
    """Check that a model can be called layer by layer, with windows of this length."""
    verify(model, windows.tokens_ST[:1], lengths={"data.evaluation_length": windows.tokens_ST.shape[1]})


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
    if evaluation.protocol is not None:
        shown["text"] = evaluation.protocol.describe()
    return shown


def _model_line(model: LanguageModel, state: State) -> str:
    parameters = sum(parameter.numel() for parameter in state.decoder.model.parameters())
    return f"{shortened(model.describe(), 100)}, {parameters / 1e6:.1f} M parameters"


def _measure(evaluation: Evaluation, states: Mapping[str, State], clock: Clock, console: Console) -> Measured:
    """Measure all states on the windows.

    Raises:
        Refusal: Not one window fits into memory.
    """
    windows = evaluation.windows
    assert windows is not None
    try:
        rounds = choose_rounds(
            [state.decoder for state in states.values()],
            (len(windows.tokens_ST), windows.tokens_ST.shape[1]),
            batch_size=evaluation.batch_size,
            limit=evaluation.limit,
        )
    except ValueError as error:
        raise Refusal(str(error)) from error
    settings: dict[str, Any] = {"compute": evaluation.compute, "agrees": evaluation.agrees}
    settings |= {"batch_size": rounds.batch_size, "round_size": rounds.size}
    total = SideBySide(states=states, **settings).num_ticks(windows)
    with clock.phase("measure"), EvaluationProgress(console, total) as progress:
        return SideBySide(states=states, **settings, tick=progress.tick).measure(windows)


def _entry(evaluation: Evaluation, measured: Measured, clock: Clock) -> dict[str, Any]:
    """The entry of the record."""
    seconds = {name: round(value, 3) for name, value in (clock.seconds | {"total": clock.total()}).items()}
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checkpoint": evaluation.subject.name,
        "dense": evaluation.dense_name,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(evaluation.compute.device),
        "versions": versions(),
        "settings": evaluation.settings,
        "perplexity": _perplexity(evaluation, measured) if evaluation.settings["perplexity"] else None,
        "agreement": measured.agreement.as_json() if measured.agreement is not None else None,
        "tasks": None,
        "continuations": None,
        "drift": None,
    }


def _perplexity(evaluation: Evaluation, measured: Measured) -> dict[str, Any]:
    """Perplexity of all states, with its protocol and the share of the gap that was won back."""
    assert evaluation.protocol is not None
    nats = measured.nats
    perplexity = {name: perplexity_of(value) for name, value in nats.items()}
    gaps = {
        name: share_recovered(values["dense"], values["pruned"], values["checkpoint"]) if "pruned" in values else None
        for name, values in (("gap_recovered", perplexity), ("gap_recovered_nats", nats))
    }
    return {"protocol": asdict(evaluation.protocol), "nats": nats, "perplexity": perplexity, **gaps}
