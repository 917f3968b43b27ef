"""Zero-shot and few-shot tasks, through the harness that everyone compares by: lm-eval (the extra `eval`).

The model in memory is handed to the harness as it is, in its own dtype, so that the numbers are those of lm-eval's own
command on the same checkpoint (tests/evaluate/test_harness.py). Tasks are found and their data are loaded before any
model is: what cannot be had costs no run.
"""

import difflib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_recon.model.decoder import cause, moved_to

LISTS = {
    "paper": ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
    "reasoning": ("gsm8k", "humaneval"),
}
CODE_ALLOWED = "HF_ALLOW_CODE_EVAL"  # the variable by which the metric of humaneval is allowed to run code


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, ready to be run on models.

    Attributes:
        names: Names of tasks and groups that were asked for, lists and tags resolved.
        items: The harness's own objects for them.
        manager: The harness's index of tasks.
        fewshot: Examples before each question; None: as each task says itself.
        unsafe_code: Whether tasks may run code that the model wrote.
    """

    names: tuple[str, ...]
    items: list[Any] = field(repr=False)
    manager: Any = field(repr=False)
    fewshot: int | None = None
    unsafe_code: bool = False


@dataclass(frozen=True)
class TaskResult:
    """What a model scored in one metric of a task, or of a group of tasks.

    Attributes:
        task: Its name.
        metric: Such as "acc" or "acc_norm"; with the filter of answers, where the task has one ("exact_match,strict").
        state: What was evaluated: "checkpoint" or "dense".
        value: The score.
        stderr: Standard error of the value; None where the harness gives none.
        samples: Number of questions.
        fewshot: Number of examples before each; None for a group whose tasks differ.
    """

    task: str
    metric: str
    state: str
    value: float
    stderr: float | None
    samples: int
    fewshot: int | None


def load_tasks(
    asked: Sequence[str], *, tasks_path: Path | None = None, fewshot: int | None = None, unsafe_code: bool = False
) -> LoadedTasks:
    """Find tasks and load their data; no model is needed.

    Args:
        asked: Names of tasks, groups or tags of lm-eval, or of the lists "paper" and "reasoning".
        tasks_path: Folder with YAML files of further tasks, which win over those of lm-eval with the same name.
        fewshot: Examples before each question; None: as each task says itself, mostly none. A task that says 0 itself
            has none in any case.
        unsafe_code: Whether tasks may run code that the model wrote, on this machine and without a sandbox.

    Raises:
        ValueError: lm-eval is not installed, a task is unknown, would run code of the model unasked, or its data cannot
            be loaded.
    """
    names = list(dict.fromkeys(name for one in asked for name in LISTS.get(one, (one,))))
    if not names:
        raise ValueError(f"tasks: none is given; expected names of tasks of lm-eval, or {' or '.join(LISTS)}.")
    if fewshot is not None and fewshot < 0:
        raise ValueError(f"fewshot={fewshot}: expected a number of examples, 0 or more.")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError('tasks are run by lm-eval, which is not installed: pip install "lit-recon[eval]".')
    if tasks_path is not None and not any(tasks_path.glob("**/*.yaml")):
        raise ValueError(f"tasks_path={tasks_path}: expected a folder with tasks of lm-eval in YAML files (*.yaml).")
    with _quiet(), _code_allowed(unsafe_code):
        manager = _index(names, tasks_path)
        _check_names(names, manager.task_index, unsafe_code)
        items, resolved = _load(names, manager)
        unsafe = sorted({task.task_name for task in _leaves(items) if getattr(task, "UNSAFE_CODE", False)})
    if unsafe and not unsafe_code:
        raise ValueError(f"tasks: {_runs_code(unsafe)}")
    return LoadedTasks(tuple(resolved), items, manager, fewshot, unsafe_code)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: LoadedTasks,
    *,
    state: str = "checkpoint",
    device: torch.device | None = None,
    batch_size: int = 1,
    expect: Callable[[int], None] = lambda requests: None,
    answered: Callable[[], None] = lambda: None,
) -> list[TaskResult]:
    """Run tasks on a model in memory, in its own dtype.

    The harness seeds the process's random numbers, as its own command does.

    Args:
        model: The model; it is left as it was.
        tokenizer: Its tokenizer.
        tasks: The tasks.
        state: What the model is, in the results.
        device: Where; all of the model is moved there and back. None: where it is.
        batch_size: Questions at once.
        expect: Is told how many requests come, once for each kind of them.
        answered: Is told of each answer.

    Raises:
        ValueError: The harness cannot run them, a tokenizer of no use to it, or a device without the memory.
    """
    from lm_eval import simple_evaluate

    from lit_recon.evaluate.counted_model import CountedModel

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("tasks: the tokenizer has no token that starts or ends a text, which lm-eval needs.")
    try:
        with _quiet(), _code_allowed(tasks.unsafe_code), moved_to(model, device or model.device):
            own = deepcopy(tokenizer)  # the harness sets its pad
            counted = CountedModel(
                pretrained=model, tokenizer=own, batch_size=batch_size, expect=expect, answered=answered
            )
            found = simple_evaluate(
                model=counted,
                tasks=tasks.items,
                num_fewshot=tasks.fewshot,
                task_manager=tasks.manager,
                confirm_run_unsafe_code=tasks.unsafe_code,
                log_samples=False,
            )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"tasks: {batch_size} questions at once and the whole model do not fit into the device's memory; lower the "
            "batch size, or use the CPU."
        ) from error
    except Exception as error:  # tasks are code of others, which may raise anything
        raise ValueError(f"tasks: lm-eval cannot run {', '.join(tasks.names)}: {cause(error)}.") from error
    assert found is not None
    return _results(found, state)


def tasks_as_json(results: Sequence[TaskResult], tasks: LoadedTasks) -> dict[str, Any]:
    """The entry `tasks` of evaluations.json: all results, and for each state the mean of `acc` over the tasks.

    The mean is over the tasks and groups that were asked for; None where one of them has no `acc`.
    """
    means: dict[str, float | None] = {}
    for state in dict.fromkeys(result.state for result in results):
        scores = {one.task: one.value for one in results if one.state == state and one.metric == "acc"}
        complete = all(name in scores for name in tasks.names)
        means[state] = fmean(scores[name] for name in tasks.names) if complete else None
    return {"harness": version("lm_eval"), "results": [asdict(result) for result in results], "mean": means}


def _index(names: Sequence[str], tasks_path: Path | None) -> Any:
    """The harness's index of tasks; where all are in the user's folder, without its own 14,000, which take a minute."""
    from lm_eval.tasks import TaskManager

    if tasks_path is not None:
        own = TaskManager(include_path=str(tasks_path), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=None if tasks_path is None else str(tasks_path))


def _check_names(names: Sequence[str], index: Mapping[str, Any], unsafe_code: bool) -> None:
    """Raise a ValueError for names that are no tasks, and for tasks that run code of the model unasked."""
    problems = []
    for name in names:
        if name not in index:
            close = difflib.get_close_matches(name, [*index, *LISTS], n=3)
            problems.append(f"lm-eval has no task {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))
    unsafe = [name for name in names if name in index and (index[name].cfg or {}).get("unsafe_code")]
    if unsafe and not unsafe_code:
        problems.append(_runs_code(unsafe))
    if problems:
        raise ValueError(f"tasks: {'; '.join(problems)}")


def _runs_code(names: Sequence[str]) -> str:
    """Why tasks are refused that run code."""
    return (
        f"{', '.join(names)} would run code that the model writes on this machine, without a sandbox: give "
        "unsafe_code=true if that may be, or leave it out"
    )


def _load(names: Sequence[str], manager: Any) -> tuple[list[Any], list[str]]:
    """The harness's objects for some names, with their data, and the names of these.

    Raises:
        ValueError: The first that cannot be loaded; where the Hub is silent, each would be waited for half a minute.
    """
    items, resolved = [], []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # of data sets, or of code that comes with a task
            raise ValueError(f"tasks: {name} cannot be loaded: {cause(error)}{_remedy(error)}.") from error
        found = loaded["groups"][name] if name in loaded["groups"] else list(loaded["tasks"].values())
        items += found if isinstance(found, list) else [found]
        resolved += list(loaded["tasks"]) if isinstance(found, list) else [name]  # of a tag, its tasks
    return items, resolved


def _remedy(error: BaseException) -> str:
    """What to do where a data set is not on this machine and cannot be fetched."""
    chain = [error]
    while below := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(below)
    if not any(isinstance(link, (ConnectionError, FileNotFoundError)) for link in chain):
        return ""
    return (
        "; its data set or metric is not in the cache of this machine, and the Hub did not answer: check the network "
        "and HF_HUB_OFFLINE, copy the cache (HF_HOME) of a machine that has it, or give tasks of your own (tasks_path)"
    )


def _leaves(items: Sequence[Any]) -> Iterator[Any]:
    """The tasks among tasks and groups, and in these."""
    for item in items:
        yield from item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]


def _results(found: Mapping[str, Any], state: str) -> list[TaskResult]:
    """The harness's own answer as results, tasks before groups."""
    results = []
    for task, row in {**found["results"], **found.get("groups", {})}.items():
        for key, value in row.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = row.get(f"{metric}_stderr,{kept}")
            name = metric if kept == "none" else key
            known = float(stderr) if isinstance(stderr, (int, float)) else None
            shots = found["n-shot"].get(task)
            results.append(TaskResult(task, name, state, float(value), known, int(row["sample_len"]), shots))
    return results


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's remarks on models that are handed to it, and on each setting of each task."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """Let metrics run code of the model, where the user allowed it."""
    before = os.environ.get(CODE_ALLOWED)
    if allowed:
        os.environ[CODE_ALLOWED] = "1"
    try:
        yield
    finally:
        if allowed and before is None:
            del os.environ[CODE_ALLOWED]
        elif allowed:
            os.environ[CODE_ALLOWED] = str(before)
