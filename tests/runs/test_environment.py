"""The environment of a run: what a cluster's scheduler, a terminal or a user has set there changes nothing."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, content, tiny_settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RANKS = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "NODE_RANK": "1", "GROUP_RANK": "1"}
JOBS = {
    "torchrun": {**RANKS, "TORCHELASTIC_RUN_ID": "7", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1234"},
    "srun": {
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"},
        **{"SLURM_LOCALID": "3", "SLURM_NODEID": "1", "SLURM_NODELIST": "elsewhere[1-2]"},
    },
    "sbatch": {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_NTASKS": "8"},
    "jsrun": {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "8", "LSB_JOBID": "7", "LSB_DJOB_RANKFILE": "absent"},
    "plain": {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "bogus", "SLURM_PROCID": "", "RANK": "first"},
}
JOBS["all"] = JOBS["srun"] | JOBS["jsrun"] | JOBS["torchrun"] | JOBS["plain"]


@pytest.mark.parametrize("job", [pytest.param(job, marks=() if job == "all" else pytest.mark.slow) for job in JOBS])
def test_a_run_is_one_process_that_writes_its_curves_whatever_the_environment_says_of_others(
    model_folder: Path, text_file: Path, tmp_path: Path, job: str
) -> None:
    settings = [*tiny_settings(model_folder, text_file), 'output_dir="café [red]"']
    command = [sys.executable, "-W", "ignore", "-m", "lit_recon.fit", *settings]
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ | JOBS[job], capture_output=True, timeout=300)
    out = ended.stdout.decode()
    assert ended.returncode == 0 and not ended.stderr, ended
    run = tmp_path / "café [red]"
    assert f"files {'caf' + chr(92) + 'xe9' if 'PYTHONIOENCODING' in JOBS[job] else 'café'} [red]/" in " ".join(
        out.split()
    )
    names = {"config.yaml", "results.json", "checkpoint", "masks.safetensors", "tensorboard", "report.html", "figures"}
    assert {path.name for path in run.iterdir()} == names
    assert {path.name for path in tmp_path.iterdir()} == {run.name}
    curves = EventAccumulator(str(run / "tensorboard")).Reload().Tags()["scalars"]
    assert {"block_02/loss/train", "block_02/loss/held_out", "perplexity/reconstructed"} <= set(curves)
    assert (run / "figures" / "learning_curves.png").exists()


def test_arguments_of_the_trainer_in_the_environment_are_refused_since_no_configuration_would_have_them(
    tiny_run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_TRAINER_LIMIT_TRAIN_BATCHES", "1")
    monkeypatch.setenv("PL_TRAINER_MAX_TIME", "")
    ended = tiny_run()
    assert ended.status == 2 and not content(Path())
    assert ended.err == (
        "trainer: the environment has PL_TRAINER_LIMIT_TRAIN_BATCHES, which Lightning's Trainer obeys and config.yaml "
        "would not know; unset that and give +trainer.limit_train_batches=1.\n"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("trainer.enable_checkpointing=true", "trainer.enable_checkpointing=True: "),
        ("trainer.enable_checkpointing=abc", "trainer.enable_checkpointing=abc: "),
        (
            "+trainer.callbacks=[{_target_:lightning.pytorch.callbacks.ModelCheckpoint}]",
            ": of its callbacks, ModelCheckpoint writes",
        ),
        (
            "+trainer.callbacks=[{_target_:lightning.pytorch.callbacks.OnExceptionCheckpoint,dirpath:.}]",
            ": of its callbacks, OnExceptionCheckpoint writes",
        ),
    ],
)
def test_no_pickle_is_ever_written(tiny_run: Callable[..., Ended], given: str, message: str) -> None:
    ended = tiny_run(given)
    assert ended.status == 2 and message in ended.err and "Traceback" not in ended.err, ended
    assert not content(Path())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf_8_are_read_and_for_the_output_refused(
    tiny_run: Callable[..., Ended], text_file: Path, tmp_path: Path, drawn: None
) -> None:
    ended = tiny_run('output_dir="o\udce9"')
    assert ended.status == 2 and not content(Path()), ended
    assert (
        ended.err
        == "output_dir=o\\udce9: the name is not UTF-8, which libraries that write there need; choose another.\n"
    )
    shutil.copy(text_file, tmp_path / "w\udce9.txt")
    ended = tiny_run('data.paths=["w\udce9.txt"]')
    assert ended.status == 0, ended
    assert Path("run/report.html").exists()
