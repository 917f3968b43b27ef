"""Forecast of how long runs take: the plans of all that differ in it, made by one process before the first run starts.

    python -m lit_recon.fit.forecast        reads command lines as JSON, writes a line of JSON for each

Most of a plan's time is the start of a process and its imports, which all share here; and runs that differ in settings
by which no time changes (seed, sparsity, a rate) share a plan. It is a process of its own, so that the sweep keeps none
of the memory that models took.
"""

import lit_recon.system.environment  # noqa: F401, before what it is for

# isort: split
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write
from transformers import PreTrainedTokenizerBase

from lit_recon.activations.disk_store import nearest
from lit_recon.data.mixture import OtherEvaluation
from lit_recon.data.source import Samples, TextSource
from lit_recon.fit.configure import prepare
from lit_recon.fit.job import Execution, Job
from lit_recon.fit.plan.estimate import Plan
from lit_recon.fit.plan.memory_limit import adopt, choose, plan_job
from lit_recon.fit.run import load
from lit_recon.fit.samples import make_samples
from lit_recon.fit.signature import OF_ONE_CALL
from lit_recon.model.loading import LanguageModel
from lit_recon.settings.conf import CONF
from lit_recon.settings.sweep import Member
from lit_recon.system.clock import Clock
from lit_recon.system.command_line import as_argument, in_words
from lit_recon.system.memory import release_memory
from lit_recon.system.quiet_libraries import quiet

_NO_TIME = (*OF_ONE_CALL, "output_dir", "experiment_dir", "seed")  # settings by which the time of a run does not change


@dataclass(frozen=True)
class Forecast:
    """What a run will take, or why it will be refused.

    Attributes:
        seconds: Of the walk and the evaluations, as its plan predicts them.
        load: Seconds until then, as they were measured for the plan.
        windows: How many windows it has.
        refused: What is wrong with it; empty if nothing was found.
    """

    seconds: float = 0.0
    load: float = 0.0
    windows: int = 0
    refused: str = ""


def forecasts(members: Sequence[Member]) -> dict[str, Forecast]:
    """Forecasts of the members of a sweep by their names; without those of which nothing could be found out.

    Members whose configurations differ in nothing that takes time share one. The start of a process is part of `load`.
    """
    alike: dict[str, list[Member]] = {}
    for member in members:
        alike.setdefault(member.name if member.config is None else _what_takes_time(member.config), []).append(member)
    groups = list(alike.values())
    lines = [[*first.words, *_elsewhere(first), *first.of_hydra] for first, *_ in groups]
    began, start, found = time.monotonic(), 0.0, []
    with subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps(lines) + "\n")
            process.stdin.close()
            for number, line in enumerate(process.stdout):
                if number == 0:  # it has been started
                    start = time.monotonic() - began
                else:
                    found.append(Forecast(**json.loads(line)))
        except KeyboardInterrupt:
            process.kill()
            raise
    shared = zip(groups, found, strict=False)  # fewer, if it was killed
    return {one.name: replace(forecast, load=start + forecast.load) for group, forecast in shared for one in group}


def _elsewhere(member: Member) -> list[str]:
    """Words that give a member an output folder where nothing is, on the same disk: what its own holds is its alone."""
    if member.config is None or not isinstance(member.config.get("output_dir"), str):
        return []
    folder = Path(member.config["output_dir"]).with_name(f".forecast-{os.getpid()}")  # never made
    return shlex.split(as_argument("output_dir", folder))


def _what_takes_time(config: Mapping[str, Any]) -> str:
    """Those settings of a run by which its time may change, as a text."""
    decides = {key: value for key, value in config.items() if key not in _NO_TIME}
    decides = json.loads(json.dumps(decides, default=str))
    if isinstance(decides.get("sparsity"), float) and isinstance(decides.get("pattern"), dict):
        decides["sparsity"] = decides["pattern"]["sparsity"] = None
    optimizer = (decides.get("module") or {}).get("optimizer")
    if isinstance(optimizer, dict) and isinstance(optimizer.get("lr"), float):  # probe takes longer
        optimizer["lr"] = None
    return json.dumps(decides, sort_keys=True)


def main() -> None:
    """Answer the command lines on standard input, as the runs that they are would be planned."""
    logging.basicConfig(level=logging.ERROR)
    quiet()
    answers = sys.stdout
    sys.stdout = sys.stderr  # what else is printed
    _write(answers, {})
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        for words in json.loads(sys.stdin.readline()):
            _write(answers, asdict(forecast(words)))
            release_memory()


def forecast(words: Sequence[str]) -> Forecast:
    """The forecast of one run, from its command line in Hydra's grammar; Hydra is initialised."""
    began = time.monotonic()
    try:
        job = prepare(_composed(words), samples_of=stand_in)
        plan, load = predict(job), time.monotonic() - began
    except Exception as error:  # the run will say it in its own words
        return Forecast(refused=in_words(error))
    return Forecast(seconds=plan.seconds, load=load, windows=plan.windows)


def predict(job: Job) -> Plan:
    """The plan of a run, of which nothing is printed and nothing kept.

    Raises:
        ValueError: What loading finds, or nothing fits into its limit of memory.
    """
    with TemporaryDirectory(prefix="lit_recon.", dir=nearest(job.output.folder)) as scratch:
        session = load(job, Path(scratch), Clock())
        with session.chain.passes.store:
            if job.execution.memory_limit is not None:
                job, session = adopt(choose(job, session), job, session)
            return plan_job(job, session)


def stand_in(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, model: LanguageModel, execution: Execution
) -> Samples:
    """Samples of a source; where the model would have to generate them, which takes long, as many of other text."""
    if not (source.needs_model and isinstance(source, OtherEvaluation)):
        return make_samples(source, tokenizer, model, execution)
    counts = {field.name: getattr(source, field.name) for field in fields(TextSource)}
    counts |= {"num_samples": 1, "num_retraining": 0}
    samples = make_samples(replace(source.evaluation, **counts), tokenizer, model, execution)
    own, one_ST = source.num_retraining, samples.calibration_ST
    return replace(
        samples,
        calibration_ST=one_ST.repeat(source.num_samples, 1),
        retraining_ST=one_ST.repeat(own, 1) if own else None,
    )


def _composed(words: Sequence[str]) -> DictConfig:
    """The configuration of a run as Hydra gives it to its task."""
    cfg = compose("fit", overrides=list(words), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with read_write(cfg), open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _write(answers: Any, content: Mapping[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # the sweep says what is left
        main()
