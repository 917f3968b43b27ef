"""The environment of a run: what a cluster's scheduler, a terminal or a user has set there changes nothing."""

import os
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
        ("trainer.enable_checkpointing=true", "trainer.enable_checkpointing=True: expected false; a run commits"),
        ("trainer.enable_checkpointing=abc", "trainer.enable_checkpointing=abc: expected false; a run commits"),
        ("+trainer.callbacks=[{_target_:lightning.pytorch.callbacks.ModelCheckpoint}]", "ModelCheckpoint"),
        ("+trainer.callbacks=[{_target_:lightning.pytorch.callbacks.OnExceptionCheckpoint,dirpath:.}]", "Checkpoint"),
    ],
)
def test_no_pickle_is_ever_written(tiny_run: Callable[..., Ended], given: str, message: str) -> None:
    ended = tiny_run(given)
    assert ended.status == 2 and message in ended.err and "Traceback" not in ended.err, ended
    assert not content(Path())
