"""A run goes on from its last whole commit, or is refused with the reason; expected bytes are of a run in one go."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Ended, content, letter_tokenizer, mounted, numbers, pairs, tiny_settings
from launcher import Launcher, Running, copied
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lit_recon
from lit_recon.fit.output.checkpoint import save_whole
from lit_recon.model.architectures import tiny_model
from lit_recon.system.lock import hold

SLOW = "trainer.max_epochs=12"  # long enough to be interrupted in a window


def said(text: str) -> str:
    """What was said, without the breaks of lines."""
    return " ".join(text.split())


def found(run: Path | str) -> dict[str, object]:
    """What a run is for: checkpoint, masks, numbers."""
    masks = (Path(run) / "masks.safetensors").read_bytes()
    return {"checkpoint": content(Path(run) / "checkpoint"), "masks": masks, "numbers": numbers(Path(run))}


Go = Callable[..., Ended]


@pytest.fixture
def settings(model_folder: Path, text_file: Path) -> list[str]:
    """Those of a tiny run."""
    return tiny_settings(model_folder, text_file)


@pytest.fixture
def go(launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Go:
    """The command line in a process of its own, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return launcher.run


@pytest.fixture(scope="module")
def once(
    launcher: Launcher, model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """A run that nothing interrupts, which no test changes, and by how many steps the disk changes."""
    run = tmp_path_factory.mktemp("whole") / "run"
    ended = launcher.run(*tiny_settings(model_folder, text_file), f"output_dir={run}", die_at=10**9)
    assert ended.status == 0, ended.err
    return run, ended.steps


@pytest.fixture(scope="module")
def whole(once: tuple[Path, int]) -> dict[str, object]:
    """What that run finds."""
    return found(once[0])


@pytest.fixture(scope="module")
def stopped(
    launcher: Launcher, model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Ended]:
    """A run that was stopped after two of its three windows; no test changes it."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    ended = launcher.run(*tiny_settings(model_folder, text_file), f"output_dir={run}", "stop_after=2")
    return run, ended


@pytest.fixture(scope="module")
def gone_on(launcher: Launcher, stopped: tuple[Path, Ended], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run to its end; no test changes it."""
    run = copied(stopped[0], tmp_path_factory.mktemp("gone_on") / "run")
    ended = launcher.run(f"resume={run}")
    assert ended.status == 0, ended.err
    return run


@pytest.fixture
def run(stopped: tuple[Path, Ended], tmp_path: Path) -> Path:
    """A copy of it, in which what is one file under two names is so too."""
    return copied(stopped[0], tmp_path / "run")


def assert_done_up_to(checkpoint: Path, done: int, dense_folder: Path, *, total: int = 3) -> None:
    """The first layers are pruned by half and changed, all else is as in the dense model."""
    model, dense = (AutoModelForCausalLM.from_pretrained(folder) for folder in (checkpoint, dense_folder))
    for name, weight in model.named_parameters():
        layer = re.search(r"layers\.(\d)\.", name)
        if layer is None or int(layer[1]) >= done:
            assert torch.equal(weight, dense.get_parameter(name)), name
        elif weight.dim() >= 2 and not name.endswith("mlp.gate.weight"):  # a router
            assert (weight == 0).sum() == weight.numel() // 2, name
            assert not torch.equal(weight[weight != 0], dense.get_parameter(name)[weight != 0]), name
    of_windows = re.search(r"\| unfinished \| (\d) of (\d) windows", (checkpoint / "README.md").read_text())
    assert of_windows and of_windows.groups() == (str(done), str(total))


def test_a_run_that_shall_stop_leaves_a_model_that_is_done_so_far_and_dense_from_there(
    stopped: tuple[Path, Ended], model_folder: Path
) -> None:
    run, ended = stopped
    assert ended.status == 0, ended.err
    assert f"2 of 3 windows are done (block_00 to block_01); {run}/checkpoint holds them" in said(ended.out)
    assert f"python -m lit_recon.fit resume={run}" in said(ended.out)
    assert_done_up_to(run / "checkpoint", 2, model_folder)
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "checkpoint", "commits", "commits.begun", "masks.safetensors", "tensorboard")
    }
    assert len(load_file(run / "masks.safetensors")) == 14


def test_what_was_stopped_is_gone_on_with_from_there(
    go: Go, run: Path, whole: dict[str, object], model_folder: Path
) -> None:
    ended = go("resume=run", "stop_after=1")  # is already done
    assert ended.status == 0 and "2 of 3 windows are done" in said(ended.out)
    assert_done_up_to(run / "checkpoint", 2, model_folder)
    ended = go("resume=run")
    assert ended.status == 0, ended.err
    assert "resume 2 of 3 windows are done" in said(ended.out)
    assert "3/3 block_02" in ended.out and "2/3" not in ended.out
    assert found(run) == whole
    assert "unfinished" not in (run / "checkpoint" / "README.md").read_text()


def test_seconds_and_peaks_of_a_run_in_two_parts_are_those_of_both(stopped: tuple[Path, Ended], gone_on: Path) -> None:
    before = json.loads((stopped[0] / "commits" / "00002.json").read_text())["state"]
    results = json.loads((gone_on / "results.json").read_text())
    seconds, peaks = results["seconds"], results["phase_peak_memory_bytes"]
    assert seconds["total"] > before["elapsed"] > 0
    for phase, earlier in before["seconds"].items():
        assert seconds[phase] >= round(earlier, 3), phase
    assert results["walk_peak_memory_bytes"] >= before["peaks"]["walk"] > 0
    assert all(peaks[phase] >= before["peaks"][phase] for phase in peaks if phase in before["peaks"])


NOISY = """
import torch
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.modules.masked_weights import MaskedWeights


class Random(Wanda):
    def scores(self, weight_OI, statistics):
        return torch.rand_like(weight_OI)


class Noisy(MaskedWeights):
    def training_step(self, batch, batch_idx):
        noise = torch.rand(()) * torch.randn_like(batch.targets_BTD)
        return super().training_step(batch, batch_idx) + (self.window(batch.inputs_BTD, batch.calls) * noise).mean()
"""


@pytest.mark.parametrize(
    "drawing",
    [
        "module._target_=mine.Noisy criterion._target_=mine.Random",
        pytest.param("module._target_=mine.Noisy", marks=pytest.mark.slow),
        pytest.param("criterion._target_=mine.Random", marks=pytest.mark.slow),
    ],
)
def test_what_draws_random_numbers_is_gone_on_with_as_if_it_had_not_stopped(
    go: Go, settings: list[str], tmp_path: Path, whole: dict[str, object], drawing: str
) -> None:
    (tmp_path / "mine.py").write_text(NOISY)
    settings = [*settings, *drawing.split()]
    assert go(*settings, "output_dir=once").status == 0
    assert go(*settings, "output_dir=parts", "stop_after=1").status == 0
    ended = go("resume=parts")
    assert ended.status == 0, ended
    assert found("parts") == found("once")
    assert found("parts")["checkpoint"] != whole["checkpoint"]


def test_a_changed_file_of_the_users_own_and_one_that_it_imports_are_refused(
    go: Go, settings: list[str], tmp_path: Path
) -> None:
    (tmp_path / "helper.py").write_text("SHARE = 0.5\n")
    (tmp_path / "mine.py").write_text("import helper\n" + NOISY)
    assert go(*settings, "module._target_=mine.Noisy", "stop_after=1").status == 0
    before = content(Path("run"))
    (tmp_path / "helper.py").write_text("SHARE = 0.25\n")
    refused(go("resume=run"), Path("run"), before, "code has changed (helper)")
    (tmp_path / "helper.py").write_text("SHARE = 0.5\n")
    (tmp_path / "mine.py").write_text("import helper\n" + NOISY.replace("rand(())", "rand(()) / 2"))
    refused(go("resume=run"), Path("run"), before, "code has changed (mine, mine.Noisy)")


def test_changed_code_of_the_package_is_refused(
    command: Callable[..., Ended], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(run)
    package = shutil.copytree(Path(lit_recon.__file__).parent, tmp_path / "lit_recon")
    masks = package / "pruning" / "masks.py"
    masks.write_text(masks.read_text() + "\n")
    monkeypatch.setattr("lit_recon.fit.signature._PACKAGE", package)
    refused(command("resume=run"), run, before, "code has changed (lit_recon/pruning/masks.py)")


def test_another_machine_is_told_and_the_run_is_resumed(
    command: Callable[..., Ended], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "ABACUS")
    monkeypatch.setattr("lit_recon.fit.output.folder.write_report", lambda folder: None)
    ended = command("resume=run")
    assert ended.status == 0, ended
    assert "instructions of the CPU was" in said(ended.out) and "and is ABACUS; the run is resumed" in said(ended.out)


def test_a_limit_that_what_was_begun_does_not_keep_is_refused_with_numbers(go: Go, run: Path) -> None:
    before = content(run)
    ended = go("resume=run", "memory_limit=1MB")
    refused(ended, run, before, "memory_limit=1.00 MB: windows=block with data.batch_size=2", "need 0.")
    assert go("resume=run", "memory_limit=100GB").status == 0


def test_the_curves_of_a_run_in_two_parts_are_those_of_one(gone_on: Path, once: tuple[Path, int]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curves(run: Path) -> dict[str, list]:
        read = EventAccumulator(f"{run}/tensorboard", size_guidance={"scalars": 0}).Reload()
        tags = set(read.Tags()["scalars"]) - {"seconds"}
        return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in tags}

    assert len(curves(once[0])) > 9 and curves(gone_on) == curves(once[0])


def truncate(path: Path) -> str:
    size = path.stat().st_size
    os.truncate(path, size - 1)
    return f"{path.name}: {size - 1} bytes instead of {size}"


def flip(path: Path) -> str:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size * 2 // 3)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 16]))
    return f"{path.name}: content changed"


def remove(path: Path) -> str:
    path.unlink()
    return f"{path.name}: missing"


@pytest.mark.parametrize(
    ("name", "damage"),
    pairs(
        ["layer_00001.00002", "masks.00002", "chain.00002", "manifest"], [truncate, flip, remove], ["manifest"], [flip]
    ),
)
def test_a_damaged_file_is_named_and_the_run_goes_on_from_the_commit_before_it(
    go: Go, run: Path, whole: dict[str, object], name: str, damage: Callable[[Path], str]
) -> None:
    if name == "manifest":
        damage(run / "commits" / "00002.json")
        message = "commit 2 is damaged: 00002.json: content changed; resuming from commit 1"
    else:
        message = f"commit 2 is damaged: {damage(run / 'commits' / f'{name}.safetensors')}; resuming from commit 1"
    ended = go("resume=run")
    assert ended.status == 0, ended.err
    if name == "manifest" and damage is remove:
        message = "resume 1 of 3 windows are done"  # that there was another is not known
    assert message in said(ended.out)
    assert "2/3 block_01" in ended.out and "1/3 block_00" not in ended.out
    assert found(run) == whole


def test_a_window_whose_commit_is_damaged_is_dense_again_in_the_checkpoint(
    go: Go, run: Path, model_folder: Path
) -> None:
    flip(run / "commits" / "layer_00001.00002.safetensors")  # one file with a shard of the checkpoint
    assert go("resume=run", "stop_after=1").status == 0
    assert_done_up_to(run / "checkpoint", 1, model_folder)


def test_hidden_states_of_the_dense_model_alone_are_not_committed_and_made_anew_to_the_same_bytes(
    go: Go, settings: list[str]
) -> None:
    own = [*(one for one in settings if not one.startswith("output_dir=")), "chain.inputs=dense"]
    assert go(*own, "output_dir=whole").status == 0
    assert go(*own, "output_dir=run", "stop_after=2").status == 0
    names = [path.name for path in Path("run/commits").iterdir()]
    assert any(name.startswith("layer_00001.") for name in names) and not any(one.startswith("chain.") for one in names)
    ended = go("resume=run")
    assert ended.status == 0, ended.err
    assert "hidden states of the dense model are made anew, through block_01" in said(ended.out + ended.err)
    assert found("run") == found("whole")


@pytest.mark.parametrize(
    ("names", "damage"),
    pairs(
        [("layer_00000.00001",), ("masks.00001",), ("chain.00001", "chain.00002")],
        [truncate, flip, remove],
        [("chain.00001", "chain.00002")],
        [truncate],
    ),
)
def test_where_both_commits_are_damaged_the_run_is_refused_and_nothing_is_lost(
    go: Go, run: Path, names: tuple[str, ...], damage: Callable[[Path], str]
) -> None:
    messages = [damage(run / "commits" / f"{name}.safetensors") for name in names]
    before = content(run)
    ended = go("resume=run")
    assert ended.status == 2
    for message in messages:
        assert message in ended.err
    assert "commit 1 is damaged" in ended.err and "commit 2 is damaged" in ended.err
    assert "Restore a commit's files, or start anew with overwrite=true." in ended.err
    assert "Traceback" not in ended.err
    assert content(run) == before


@pytest.mark.parametrize("lost", ["manifests", "folder"])
@pytest.mark.parametrize("killed", ["no", "streamed", "in memory"])
def test_a_run_whose_commits_are_gone_is_refused_and_left(go: Go, run: Path, lost: str, killed: str) -> None:
    for path in (run / "commits").glob("*.json"):
        path.unlink()
    if lost == "folder":
        shutil.rmtree(run / "commits")
    if killed != "no":
        (run / "masks.safetensors").unlink()
    if killed == "in memory":  # which writes its checkpoint when it ends
        shutil.rmtree(run / "checkpoint")
    before = content(run)
    refused(go("resume=run"), run, before, "windows were done, but run/commits holds no commit any more")


CHANGED = ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json", "README.md"]
CHANGED += [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 4)]  # all else, a done layer, a dense one


def test_what_was_changed_in_the_checkpoint_of_a_stopped_run_is_mended(
    go: Go, run: Path, whole: dict[str, object], stopped: tuple[Path, Ended]
) -> None:
    for how, names in ((flip, CHANGED[:-2]), (truncate, CHANGED[:-2]), (remove, CHANGED[:4])):
        for name in names:
            if "-of-" in name:  # changed in place, it would be the commit's file too
                shutil.copy(run / "checkpoint" / name, run / "copy")
                os.replace(run / "copy", run / "checkpoint" / name)
            how(run / "checkpoint" / name)
        assert go("resume=run", "stop_after=2").status == 0
        assert content(run / "checkpoint") == content(stopped[0] / "checkpoint"), how
    for name in CHANGED[-2:]:
        shutil.copy(run / "checkpoint" / name, run / "copy")
        os.replace(run / "copy", run / "checkpoint" / name)
        flip(run / "checkpoint" / name)
    assert go("resume=run").status == 0
    assert found(run) == whole


WAITING = """
import time
from pathlib import Path
from lit_recon.data.files import Files


class Slow(Files):
    def samples(self, *given, **settings):
        if Path("wait").exists():
            Path("waiting").touch()
            while not Path("go").exists():
                time.sleep(0.01)
        return super().samples(*given, **settings)
"""


@pytest.fixture
def slow(launcher: Launcher, go: Go, settings: list[str], tmp_path: Path) -> Callable[..., Running]:
    """A run that has looked at its folder and waits, before it holds it, until there is a file `go`."""
    (tmp_path / "mine.py").write_text(WAITING)

    def start(*overrides: str) -> Running:
        Path("wait").touch()
        running, end = launcher.start(*overrides), time.monotonic() + 60
        while not Path("waiting").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        Path("wait").unlink()
        return running

    settings.append("data._target_=mine.Slow")
    return start


def test_of_two_resumes_the_late_one_leaves_what_the_other_has_finished(
    go: Go, slow: Callable[..., Running], settings: list[str], whole: dict[str, object]
) -> None:
    assert go(*settings, "stop_after=2").status == 0
    late = slow("resume=run")
    assert go("resume=run").status == 0
    before = content(Path("run"))
    Path("go").touch()
    refused(late.wait(), Path("run"), before, "resume=run holds a finished run since this command began")
    assert found("run") == whole


@pytest.mark.parametrize("other", [(), ("stop_after=1",), ("overwrite=true",)])
def test_of_two_starts_the_late_one_leaves_what_the_other_has_made(
    go: Go, slow: Callable[..., Running], settings: list[str], other: tuple[str, ...]
) -> None:
    late = slow(*settings, "seed=7", *(word for word in other if word == "overwrite=true"))
    assert go(*settings, *other).status == 0
    before = content(Path("run"))
    Path("go").touch()
    refused(late.wait(), Path("run"), before, "output_dir=run holds", "since this command began")


def test_runs_of_one_second_have_folders_of_their_own(
    launcher: Launcher, go: Go, settings: list[str], whole: dict[str, object]
) -> None:
    settings.remove("output_dir=run")
    time.sleep(1 - time.time() % 1)
    started = [launcher.start(*settings) for _ in range(3)]
    assert [run.wait().status for run in started] == [0, 0, 0]
    runs = sorted(Path("runs").iterdir())
    assert len(runs) == 3 and all(found(run) == whole for run in runs)
    for run in runs:
        assert f"output_dir: {run}" in (run / "config.yaml").read_text()


def refused(ended: Ended, run: Path, before: dict[str, bytes], *messages: str) -> None:
    assert ended.status == 2, ended
    for message in messages:
        assert message in ended.err
    assert len(ended.err.splitlines()) == 1 and "Traceback" not in ended.err + ended.out
    assert content(run) == before


def test_a_setting_that_differs_is_refused_and_one_that_is_the_same_is_not(
    go: Go, run: Path, whole: dict[str, object]
) -> None:
    before = content(run)
    ended = go("resume=run", "seed=1", "trainer.max_epochs=2", "data.num_samples=8", "windows=half")
    refused(ended, run, before, "seed is 0 there and 1 here", "trainer.max_epochs is 1 there and 2 here")
    assert "windows.by is 'block' there and 'half' here" in ended.err
    assert "num_samples" not in ended.err and "Leave that out, or start a new run." in ended.err
    assert go("resume=run", "seed=0", "data.num_samples=8", "windows=block").status == 0
    assert found(run) == whole


def test_a_changed_model_is_refused(go: Go, settings: list[str], model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    settings = [f"model.name={folder}" if word.startswith("model.name") else word for word in settings]
    assert go(*settings, "stop_after=1").status == 0
    before, weights = content(Path("run")), folder / "model.safetensors"
    flip(weights)
    assert weights.stat().st_size == (model_folder / "model.safetensors").stat().st_size
    refused(go("resume=run"), Path("run"), before, "files of the dense model are not the same (model.safetensors)")


def test_one_changed_norm_in_a_large_model_is_noticed(go: Go, settings: list[str], tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=100_000).save_pretrained(folder := tmp_path / "model")  # of 26 MB
    letter_tokenizer().save_pretrained(folder)
    settings = [f"model.name={folder}" if word.startswith("model.name") else word for word in settings]
    assert go(*settings, "stop_after=1").status == 0
    before = content(Path("run"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.input_layernorm.weight"].fill_(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(go("resume=run"), Path("run"), before, "files of the dense model are not the same (model.safetensors)")


def test_a_changed_text_is_refused(go: Go, settings: list[str], text_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    settings = [f"data.paths=[{text}]" if word.startswith("data.paths") else word for word in settings]
    assert go(*settings, "stop_after=1").status == 0
    before = content(Path("run"))
    text.write_text(text_file.read_text().replace("e", "f"))
    refused(go("resume=run"), Path("run"), before, "the text gives other samples")
    text.write_text(text_file.read_text())
    assert go("resume=run").status == 0


def test_other_versions_are_refused(command: Callable[..., Ended], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_recon import __version__

    before = content(run)
    monkeypatch.setattr("lit_recon.__version__", "99.1")
    monkeypatch.setattr("lit_recon.fit.signature.version", lambda name: "98.2")
    ended = command("resume=run")
    refused(ended, run, before, f"lit_recon was {__version__} and is 99.1", "and is 98.2")
    assert f"torch was {torch.__version__.split('+')[0]}" in ended.err


def test_a_folder_of_another_program_is_not_finished(go: Go, tmp_path: Path) -> None:
    (tmp_path / "other" / "commits").mkdir(parents=True)
    (tmp_path / "other" / "results.json").write_text("{}")
    before = content(tmp_path / "other")
    refused(go("resume=other"), tmp_path / "other", before, "resume=other: no run is there (no config.yaml)")
    assert (tmp_path / "other" / "commits").is_dir()


def test_there_must_be_a_run_that_is_not_finished(go: Go, once: tuple[Path, int], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for folder in ("other", "nowhere"):
        ended = go(f"resume={folder}")
        assert ended.status == 2
        assert f"resume={folder}: no run is there (no config.yaml)" in ended.err
    assert {path.name for path in tmp_path.iterdir()} == {"other"} and not list((tmp_path / "other").iterdir())
    shutil.copytree(once[0], "run")
    Path("run/report.html").touch()  # the launcher's runs draw none
    before = content(Path("run"))
    refused(go("resume=run"), Path("run"), before, "resume=run: that run is finished; its numbers are in run/results")


def test_a_run_in_work_by_another_process_is_refused(go: Go, run: Path, whole: dict[str, object]) -> None:
    with hold(run):
        before = content(run)
        refused(go("resume=run"), run, before, f"run is in use by process {os.getpid()} on ")
    assert go("resume=run").status == 0
    assert found(run) == whole


def interrupted(running: Running, number: int, total: int) -> int:
    """Send a signal to a run; how many windows it says are done."""
    start = time.monotonic()
    running.send(number)
    ended = running.wait()
    assert time.monotonic() - start < 5
    assert ended.status == 1 and "Traceback" not in ended.err
    message = re.search(
        rf"interrupted: (\d) of {total} windows are done \(block_00 to block_0\d\); run/checkpoint holds them and is "
        r"dense from there\. Resume with: python -m lit_recon\.fit resume=run \(about \d+\.\d s more\)",
        ended.err,
    )
    assert message, ended.err
    assert not list(Path("run").rglob("*.partial")) and not Path("run/lease.json").exists()
    return int(message[1])


@pytest.mark.parametrize("kind", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_signal_ends_a_run_within_seconds_with_all_that_was_done(
    launcher: Launcher, go: Go, settings: list[str], kind: str
) -> None:
    tiny_model(kind, num_hidden_layers=5).save_pretrained("model")
    letter_tokenizer().save_pretrained("model")
    settings = [word for word in settings if not word.startswith("model.name")] + ["model.name=model", SLOW]
    ended = go(*settings, "output_dir=once")
    assert ended.status == 0, ended.err
    assert ("in memory as a whole" in said(ended.out)) == (kind == "mixtral")
    done = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        running = launcher.start("resume=run") if done else launcher.start(*settings)
        while not Path(f"run/commits/{done + 1:05}.json").exists():
            time.sleep(0.01)
        time.sleep(0.2)  # into the next window's training
        before, done = done, interrupted(running, number, 5)
        assert before < done < 5
        assert_done_up_to(Path("run/checkpoint"), done, Path("model"), total=5)
    ended = go("resume=run")
    assert ended.status == 0, ended.err
    assert found("run") == found("once")


@pytest.mark.parametrize("failure", ["ENOSPC", "EROFS"])
def test_a_disk_that_fails_at_any_step_is_told_and_the_run_can_be_gone_on_with(
    go: Go, settings: list[str], whole: dict[str, object], once: tuple[Path, int], failure: str
) -> None:
    steps = once[1]
    for step in (1, steps // 2, steps) if failure == "ENOSPC" else (steps // 2,):
        run = f"run{step}"
        ended = go(*settings, f"output_dir={run}", fail_at=step, failure=failure)
        assert ended.status == 1, ended
        committed = bool(list(Path(run).glob("commits/*.json")))
        assert committed == (step > steps // 4)
        assert ("the previous commit is whole" if committed else "nothing is committed yet") in ended.err
        assert ("free space" if failure == "ENOSPC" else "make the folder writable") in ended.err
        assert ended.err.endswith(f"resume with resume={run}\n") and len(ended.err.splitlines()) == 1
        begun = Path(run, "config.yaml").exists()
        ended = go(f"resume={run}") if begun else go(*settings, f"output_dir={run}")
        assert ended.status == 0, ended
        assert found(run) == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four mebibytes."""
    with mounted(tmp_path / "disk", "4m") as disk:
        yield disk


def fill(path: Path, *, but: int) -> None:
    """Take all space of a disk but some bytes."""
    free = shutil.disk_usage(path.parent).free
    path.write_bytes(bytes(max(0, free - but)))


@pytest.mark.parametrize("store", [pytest.param("memory", marks=pytest.mark.slow), "disk"])
def test_a_disk_that_becomes_full_in_the_walk_keeps_what_was_done(
    launcher: Launcher, go: Go, settings: list[str], small_disk: Path, store: str
) -> None:
    run, settings = small_disk / "run", [*settings, SLOW, f"store={store}"]
    assert go(*settings).status == 0
    running = launcher.start(*settings, f"output_dir={run}")
    while not (run / "commits" / "00001.json").exists():
        time.sleep(0.01)
    fill(small_disk / "ballast", but=0)
    ended = running.wait()
    assert ended.status == 1, ended
    assert "No space left on device" in ended.err and "the previous commit is whole; free space and resume" in ended.err
    assert "Traceback" not in ended.err
    (small_disk / "ballast").unlink()
    ended = go(f"resume={run}")
    assert ended.status == 0, ended
    assert found(run) == found("run")


def test_a_disk_that_becomes_full_as_a_model_in_memory_is_saved_leaves_the_earlier_checkpoint(small_disk: Path) -> None:
    model, folder = tiny_model("llama", hidden_size=128), small_disk / "checkpoint"
    save_whole(folder, model, letter_tokenizer(), "first")
    before = content(folder)
    fill(small_disk / "ballast", but=sum(map(len, before.values())) // 2)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_whole(folder, model, letter_tokenizer(), "second")
    assert caught.value.errno == errno.ENOSPC
    assert content(folder) == before and {path.name for path in small_disk.iterdir()} == {"checkpoint", "ballast"}


@pytest.mark.parametrize("room", [*(pytest.param(room, marks=pytest.mark.slow) for room in (0, 8 << 10)), 64 << 10])
def test_a_run_that_is_gone_on_with_on_a_full_disk_loses_nothing(
    go: Go, settings: list[str], whole: dict[str, object], small_disk: Path, room: int
) -> None:
    run = small_disk / "run"
    assert go(*settings, f"output_dir={run}", "stop_after=1").status == 0
    fill(small_disk / "ballast", but=room)
    ended = go(f"resume={run}")
    assert ended.status == 2, ended
    assert f"output_dir={run}: the run needs " in ended.err and "are free; free some space" in ended.err
    (small_disk / "ballast").unlink()
    assert json.loads((run / "commits" / "00001.json").read_text())["state"]["windows"][0]["name"] == "block_00"
    assert go(f"resume={run}").status == 0
    assert found(run) == whole


def test_a_folder_on_a_read_only_disk_is_refused_and_gone_on_with_when_it_is_writable(
    go: Go, settings: list[str], whole: dict[str, object], small_disk: Path
) -> None:
    run = small_disk / "run"
    assert go(*settings, f"output_dir={run}", "stop_after=1").status == 0
    before = content(run)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused(go(f"resume={run}"), run, before, f"output_dir={run} cannot be locked (Read-only file system)")
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert go(f"resume={run}").status == 0
    assert found(run) == whole


def test_a_run_whose_rates_are_probed_is_resumed_to_the_same_bytes(go: Go, settings: list[str]) -> None:
    probe = ("module.optimizer.lr=probe", "trainer.max_epochs=2")
    assert go(*settings, *probe, "output_dir=whole").status == 0
    assert go(*settings, *probe, "output_dir=parts", "stop_after=2").status == 0
    assert go("resume=parts").status == 0
    assert found("parts") == found("whole")
    first, *others = numbers(Path("whole"))["windows"]
    assert first["tries"][0][0] == 1, "the first window starts at the module's rate"
    assert {one["tries"][0][0] for one in others[:1]} == {first["rate"]}, "and carried to the next"
