"""From the configuration to an Evaluation: parts as objects, every problem in one message, no weight is read.

With subjects.py the only file of this folder that sees a configuration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from transformers import PreTrainedTokenizerBase

from lit_recon.data.packing import find_opening
from lit_recon.data.source import TextSource
from lit_recon.evaluate.continuations import PROMPTS, Decoding, encode_prompts
from lit_recon.evaluate.harness import LoadedTasks, load_tasks
from lit_recon.evaluate.perplexity import EvaluationProtocol
from lit_recon.evaluate.record import check_record
from lit_recon.evaluate.subjects import Subject, dense_of_run, find_subject, masks_of_run
from lit_recon.evaluate.windows import TextWindows, cut
from lit_recon.model.loading import LanguageModel
from lit_recon.model.precision import with_measured_precision
from lit_recon.settings import values
from lit_recon.settings.annotations import wrong_type
from lit_recon.settings.parts import make_part, make_partial
from lit_recon.settings.values import GROUP_PATHS, GROUP_TEXTS, check_call, expand_home, given_of, plain
from lit_recon.system.command_line import Problems, concerning
from lit_recon.system.device import Compute, trainer_problem
from lit_recon.system.memory import parse_limit

CALL: dict[str, Any] = {
    "checkpoint": str,
    "dense": str | None,
    "perplexity": bool,
    "agreement": bool,
    "drift": bool,
    "tasks": str | Sequence[str] | None,
    "tasks_path": str | None,
    "fewshot": int | None,
    "unsafe_code": bool,
    "prompts": str | Sequence[str] | None,
    "max_new_tokens": int,
    "temperature": float,
    "chat": bool,
    "seed": int,
    "batch_size": int,
    "opening_at": str | None,
    "record": str | None,
    "memory_limit": str | int | None,
}
OWN = "own"  # of prompts: those of lit_recon
DECODING = ("max_new_tokens", "temperature", "seed", "batch_size", "chat")
PATHS = ("checkpoint", "dense", "record", "tasks_path", *GROUP_PATHS)
TEXTS = ("checkpoint", "dense", "record", "tasks_path", "tasks", "prompts", *GROUP_TEXTS)
LONGEST = 4096  # tokens of a window, where the model's context is longer: as pruning papers have it
WITHOUT_CONTEXT = 2048  # the same where a configuration names no longest context


def is_text(setting: str) -> bool:
    """Whether a setting is a text, or a list of texts."""
    return values.is_text(setting, TEXTS)


@dataclass(frozen=True, kw_only=True)
class Text:
    """What perplexity, agreement and drift are measured on.

    Attributes:
        windows: Windows of the text.
        protocol: How they are measured.
        batch_size: Windows per pass of a layer.
    """

    windows: TextWindows
    protocol: EvaluationProtocol
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated, on what, and how.

    Attributes:
        subject: The checkpoint.
        tokenizer: Its tokenizer.
        dense: The dense model, if it is known.
        dense_name: Its name in the record.
        masks: Those of the run, if the pruned model can be made of them.
        text: What perplexity, agreement and drift are measured on; None: none of them is asked for.
        agrees: Whether the checkpoint is compared with the dense model.
        drifts: Whether the drift of each matrix is measured.
        tasks: Tasks of lm-eval, with their data.
        prompts: Texts that all states continue.
        decoding: How.
        compute: Device and precision.
        limit: Bytes of memory of its own; None: half of what is free.
        record: The file that the result is added to.
        settings: The whole configuration.
    """

    subject: Subject
    tokenizer: PreTrainedTokenizerBase
    dense: LanguageModel | None
    dense_name: str | None
    masks: Path | None
    text: Text | None
    agrees: bool
    drifts: bool
    tasks: LoadedTasks | None
    prompts: tuple[str, ...]
    decoding: Decoding
    compute: Compute
    limit: int | None
    record: Path
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """What a configuration chooses, before it is looked at together; None for what could not be made."""

    call: dict[str, Any]
    subject: Subject | None
    dense: Subject | None
    source: TextSource | None
    stride: int | None
    compute: Compute | None
    is_auto: bool
    decoding: Decoding | None
    limit: int | None
    record: Path | None


def prepare(cfg: DictConfig) -> Evaluation:
    """Build what an evaluation needs and check it all, before any weight is loaded or any file written.

    Raises:
        ValueError: With every problem that could be found at once.
    """
    problems = Problems()
    problems.check(expand_home, cfg, PATHS)
    chosen = _choose(cfg, problems)
    problems.raise_all()
    call, subject, compute, decoding = chosen.call, chosen.subject, chosen.compute, chosen.decoding
    assert subject is not None and compute is not None and decoding is not None and chosen.record is not None
    dense = chosen.dense.model if chosen.dense is not None else dense_of_run(subject)
    prompts = PROMPTS if call["prompts"] == OWN else tuple(_listed(call["prompts"]))
    with concerning(given_of("dense")):
        if call["drift"] and dense is None:
            raise ValueError("drift=true: it is that of the dense model's outputs; give dense=<model>.")
        tokenizer = subject.model.tokenizer()
        _check_pair(subject.model, dense, tokenizer, given=chosen.dense is not None)
        if chosen.is_auto:
            tokens = chosen.source.batch_size * chosen.source.evaluation_length if chosen.source else LONGEST
            compute = with_measured_precision(compute, subject.model.skeleton(), tokens)
    with concerning(given_of("prompts")):
        if prompts:
            encode_prompts(subject.model.skeleton(), tokenizer, prompts, decoding)
    with concerning(given_of("data")):
        text = _text(chosen, tokenizer, compute) if chosen.source is not None else None
    with concerning(given_of("tasks")):
        tasks = _tasks(call) if call["tasks"] else None
    return Evaluation(
        subject=subject,
        tokenizer=tokenizer,
        dense=dense,
        dense_name=chosen.dense.name if chosen.dense else dense.describe() if dense else None,
        masks=masks_of_run(subject) if dense is not None else None,
        text=text,
        agrees=call["agreement"] and dense is not None,
        drifts=call["drift"],
        tasks=tasks,
        prompts=prompts,
        decoding=decoding,
        compute=compute,
        limit=chosen.limit,
        record=chosen.record,
        settings=plain(cfg),
    )


def _choose(cfg: DictConfig, problems: Problems) -> _Chosen:
    """What a configuration chooses, with what is wrong added to the problems."""
    call = check_call(cfg, problems, CALL, paths=PATHS)
    subject, dense = (
        problems.check(find_subject, name, call[name]) if call.get(name) else None for name in ("checkpoint", "dense")
    )
    for about, one in (("checkpoint", subject), ("dense", dense)):
        if one is not None:
            problems.check(one.model.check, about=f"{about}={one.name}: ")
    source, stride = None, None
    if any(call.get(name, True) for name in ("perplexity", "agreement", "drift")):
        source, stride = _source(cfg, subject.model if subject and not problems.found else None, problems)
    elif not (call.get("tasks") or call.get("prompts")):
        problems.add("perplexity=false agreement=false: nothing is left to evaluate; leave one out, or give tasks.")
    decoding = None
    if set(DECODING) <= set(call):
        decoding = problems.check(Decoding, **{name: call[name] for name in DECODING})
    record = Path(call["record"]) if call.get("record") else subject.record if subject else None
    if record is not None:
        problems.check(check_record, record)
    return _Chosen(
        call=call,
        subject=subject,
        dense=dense,
        source=source,
        stride=stride,
        compute=_compute(cfg, problems),
        is_auto=OmegaConf.select(cfg, "trainer.precision", default="auto") == "auto",
        decoding=decoding,
        limit=problems.check(parse_limit, call["memory_limit"]) if call.get("memory_limit") is not None else None,
        record=record,
    )


def _listed(value: str | Sequence[str] | None) -> list[str]:
    """Texts of a setting that is one, several or none."""
    return [value] if isinstance(value, str) else list(value or [])


def _tasks(call: Mapping[str, Any]) -> LoadedTasks:
    """The tasks that are asked for, with their data."""
    path = Path(call["tasks_path"]) if call["tasks_path"] else None
    return load_tasks(_listed(call["tasks"]), tasks_path=path, fewshot=call["fewshot"], unsafe_code=call["unsafe_code"])


def _source(cfg: DictConfig, model: LanguageModel | None, problems: Problems) -> tuple[TextSource | None, int | None]:
    """The source of text, with windows of the model's context where no length is given; and the stride."""
    node, stride = cfg.get("data"), None
    if isinstance(node, DictConfig):
        node = node.copy()
        with open_dict(node):
            stride = plain(node.pop("stride", None))
            if node.get("evaluation_length", 0) is None:
                node.evaluation_length = _context(model) if model is not None else WITHOUT_CONTEXT
    for problem in wrong_type("data.stride", stride, int | None):
        problems.add(problem)
    source = make_part(node, "data", problems, kind=TextSource)
    if source is not None:
        problems.check(source.check)
    return source, stride


def _context(model: LanguageModel) -> int:
    """Tokens of a window for a model: its context, LONGEST at most."""
    positions = getattr(model.config().get_text_config(), "max_position_embeddings", None)
    return min(LONGEST, positions) if isinstance(positions, int) and positions > 0 else WITHOUT_CONTEXT


def _compute(cfg: DictConfig, problems: Problems) -> Compute | None:
    """Device and precision, as Lightning chooses them."""
    trainer = make_partial(cfg.get("trainer"), "trainer", problems, leave_out=("precision",))
    if trainer is None:
        return None
    if problem := trainer_problem(trainer):
        problems.add(problem)
        return None
    precision = trainer.keywords.get("precision", "auto")
    others = partial(trainer.func, **{key: value for key, value in trainer.keywords.items() if key != "precision"})
    return problems.check(Compute.choose, others, precision, about=f"{given_of('trainer')}: ")


def _check_pair(
    model: LanguageModel, dense: LanguageModel | None, tokenizer: PreTrainedTokenizerBase, *, given: bool
) -> None:
    """Raise a ValueError where a model and its dense original do not read the same tokens."""
    if dense is None:
        return
    about = "dense" if given else "the run's own model"
    sizes = [one.config().get_text_config().vocab_size for one in (model, dense)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{about}={dense.describe()}: it has {sizes[1]} tokens and the checkpoint {sizes[0]}; give the model that "
            "the checkpoint was made from."
        )
    if dense.tokenizer().get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{about}={dense.describe()}: its tokenizer has another vocabulary than the checkpoint's; give the model "
            "that the checkpoint was made from."
        )


def _text(chosen: _Chosen, tokenizer: PreTrainedTokenizerBase, compute: Compute) -> Text:
    """Windows of the evaluation text, and the protocol."""
    source = chosen.source
    assert source is not None
    # null: as pruning papers have WikiText-2, whose joined text is tokenized once; documents need an opening each
    opening_at = chosen.call["opening_at"]
    if opening_at is None:
        opening_at = "text" if source.is_one_text("evaluation") else "window"
    opening = find_opening(tokenizer, source.bos)
    if source.evaluation_length <= len(opening) + 1:
        raise ValueError(
            f"data.evaluation_length={source.evaluation_length}: give {len(opening) + 2} or more, for an opening of "
            f"{len(opening)} tokens and two of the text."
        )
    windows = cut(
        source.evaluation_stream(tokenizer),
        opening,
        length=source.evaluation_length,
        stride=chosen.stride,
        number=source.evaluation_samples,
        opening_at=opening_at,
    )
    said = "".join(map(str, tokenizer.convert_ids_to_tokens(opening))) or "none"
    protocol = EvaluationProtocol(
        dataset=source.describe("evaluation"),
        split=source.split_name("evaluation"),
        context=windows.tokens_ST.shape[1],
        windows=len(windows.tokens_ST),
        tokens=windows.num_tokens,
        precision=compute.precision,
        opening=said,
        opening_at=opening_at,
        stride=windows.stride,
    )
    return Text(windows=windows, protocol=protocol, batch_size=source.batch_size)
