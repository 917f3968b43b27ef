"""From the configuration to an Evaluation: parts as objects, every problem in one message, no weight is read.

With subjects.py the only file of this folder that sees a configuration.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Trainer
from omegaconf import DictConfig, open_dict
from transformers import PreTrainedTokenizerBase

from lit_recon.data.packing import find_opening
from lit_recon.data.source import TextSource
from lit_recon.evaluate.perplexity import EvaluationProtocol
from lit_recon.evaluate.record import check_record
from lit_recon.evaluate.subjects import Subject, dense_of_run, find_subject, masks_of_run
from lit_recon.evaluate.windows import TextWindows, cut
from lit_recon.model.loading import LanguageModel
from lit_recon.settings import values
from lit_recon.settings.annotations import wrong_type
from lit_recon.settings.parts import make_part, make_partial
from lit_recon.settings.values import GROUP_PATHS, GROUP_TEXTS, check_call, expand_home, given_of, plain
from lit_recon.system.command_line import Problems, concerning
from lit_recon.system.device import Compute
from lit_recon.system.memory import parse_limit

CALL: dict[str, Any] = {
    "checkpoint": str,
    "dense": str | None,
    "perplexity": bool,
    "agreement": bool,
    "opening_at": str,
    "record": str | None,
    "memory_limit": str | int | None,
}
PATHS = ("checkpoint", "dense", "record", *GROUP_PATHS)
TEXTS = (*PATHS, *GROUP_TEXTS)
LONGEST = 4096  # tokens of a window, where the model's context is longer: as pruning papers have it
WITHOUT_CONTEXT = 2048  # the same where a configuration names no longest context


def is_text(setting: str) -> bool:
    """Whether a setting is a text, or a list of texts."""
    return values.is_text(setting, TEXTS)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated, on what, and how.

    Attributes:
        subject: The checkpoint.
        dense: The dense model, if it is known.
        dense_name: Its name in the record.
        masks: Those of the run, if the pruned model can be made of them.
        windows: Windows of text; None: neither perplexity nor agreement is asked for.
        protocol: How they are measured.
        agrees: Whether the checkpoint is compared with the dense model.
        compute: Device and precision.
        batch_size: Windows per pass of a layer.
        limit: Bytes of memory of its own; None: half of what is free.
        record: The file that the result is added to.
        settings: The whole configuration.
    """

    subject: Subject
    dense: LanguageModel | None
    dense_name: str | None
    masks: Path | None
    windows: TextWindows | None
    protocol: EvaluationProtocol | None
    agrees: bool
    compute: Compute
    batch_size: int
    limit: int | None
    record: Path
    settings: dict[str, Any]


def prepare(cfg: DictConfig) -> Evaluation:
    """Build what an evaluation needs and check it all, before any weight is loaded or any file written.

    Raises:
        ValueError: With every problem that could be found at once.
    """
    problems = Problems()
    problems.check(expand_home, cfg, PATHS)
    call = check_call(cfg, problems, CALL, paths=PATHS)
    subject, dense = (
        problems.check(find_subject, name, call[name]) if call.get(name) else None for name in ("checkpoint", "dense")
    )
    for about, one in (("checkpoint", subject), ("dense", dense)):
        if one is not None:
            problems.check(one.model.check, about=f"{about}={one.name}: ")
    source, stride = _source(cfg, subject.model if subject and not problems.found else None, problems)
    compute = _compute(cfg, problems)
    limit = problems.check(parse_limit, call["memory_limit"]) if call.get("memory_limit") is not None else None
    record = Path(call["record"]) if call.get("record") else subject.record if subject else None
    if record is not None:
        problems.check(check_record, record)
    if {"perplexity", "agreement"} <= set(call) and not (call["perplexity"] or call["agreement"]):
        problems.add("perplexity=false with agreement=false: nothing is left to evaluate; leave one of them out.")
    problems.raise_all()
    assert subject is not None and source is not None and compute is not None and record is not None
    known = dense.model if dense is not None else dense_of_run(subject)
    with concerning(given_of("dense")):
        tokenizer = subject.model.tokenizer()
        _check_pair(subject.model, known, tokenizer, given=dense is not None)
    with concerning(given_of("data")):
        windows, opening = _windows(source, tokenizer, stride, call["opening_at"])
    return Evaluation(
        subject=subject,
        dense=known,
        dense_name=dense.name if dense else known.describe() if known else None,
        masks=masks_of_run(subject) if known is not None else None,
        windows=windows,
        protocol=_protocol(source, windows, opening, call["opening_at"], compute),
        agrees=call["agreement"] and known is not None,
        compute=compute,
        batch_size=source.batch_size,
        limit=limit,
        record=record,
        settings=plain(cfg),
    )


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
    if not (isinstance(trainer.func, type) and issubclass(trainer.func, Trainer)):
        problems.add(f"trainer._target_={trainer.func}: expected lightning.Trainer, or a class that inherits from it.")
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


def _windows(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, stride: int | None, opening_at: Any
) -> tuple[TextWindows, str]:
    """Windows of the evaluation text, and what opens them, in words."""
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
        stride=stride,
        number=source.evaluation_samples,
        opening_at=opening_at,
    )
    return windows, "".join(map(str, tokenizer.convert_ids_to_tokens(opening))) or "none"


def _protocol(
    source: TextSource, windows: TextWindows, opening: str, opening_at: str, compute: Compute
) -> EvaluationProtocol:
    """The protocol of an evaluation."""
    return EvaluationProtocol(
        dataset=source.describe("evaluation"),
        split="evaluation",
        context=windows.tokens_ST.shape[1],
        windows=len(windows.tokens_ST),
        tokens=windows.num_tokens,
        precision=compute.precision,
        opening=opening if opening == "none" or opening_at == "window" else f"{opening} (before the text alone)",
        stride=windows.stride,
    )
