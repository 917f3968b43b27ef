"""push=<owner>/<name> uploads a finished run, when it is asked to, and a mistake or a failure costs no run."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Ended, content
from hub_stand_in import TOKEN, HubStandIn
from transformers import AutoModelForCausalLM

from lit_recon.fit.output.push import MASKS, check_push


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A Hub of the test's own, at which somebody is logged in."""
    server = HubStandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def assert_uploaded(hub: HubStandIn, name: str, run: Path, folder: Path) -> None:
    """All of a run's checkpoint is there and loads from there; its card names the place."""
    files, local = dict(hub.files[name]), content(run / "checkpoint")
    card = files.pop("README.md").decode()
    assert card.startswith(local.pop("README.md").decode().replace('("checkpoint")', f'("{name}")'))
    assert MASKS in card
    assert files.pop(MASKS) == (run / "masks.safetensors").read_bytes()
    assert files == local
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_finished_run_is_uploaded_when_that_is_asked_for_and_never_otherwise(
    run_once: Callable[..., Ended], tiny_run: Callable[..., Ended], hub: HubStandIn, tmp_path: Path
) -> None:
    run_once()
    assert hub.asked == []
    before = content(Path("run"))
    ended = tiny_run("resume=run", "push=ada/tiny", "output_dir=run")
    assert ended.status == 0, ended.err
    assert "uploaded to" in ended.out and f"{hub.address}/ada/tiny" in ended.out
    assert hub.private == {"ada/tiny": True}
    assert_uploaded(hub, "ada/tiny", Path("run"), tmp_path / "read")
    assert content(Path("run")) == before
    hub.files["ada/tiny"] |= {"pytorch_model.bin": b"old", "notes.md": b"mine", "onnx/model.bin": b"other"}
    assert tiny_run("resume=run", "push=ada/tiny").status == 0
    assert "pytorch_model.bin" not in hub.files["ada/tiny"], "it would be loaded by who prefers it"
    assert {"notes.md", "onnx/model.bin"} <= hub.files["ada/tiny"].keys()


def test_a_new_run_is_uploaded_when_it_is_done_and_not_when_it_stops_before(
    tiny_run: Callable[..., Ended], hub: HubStandIn, tmp_path: Path
) -> None:
    assert tiny_run("push=ada/tiny", "plan=true").status == 0
    ended = tiny_run("push=ada/tiny", "stop_after=1")
    assert ended.status == 0, ended.err
    assert {one.split()[1] for one in hub.asked} == {"/api/whoami-v2"}, "asked before the run, and nothing uploaded"
    hub.failing = "commit"
    ended = tiny_run("resume=run", "push=ada/tiny")
    assert ended.status == 1 and Path("run/results.json").is_file() and Path("run/report.html").parent.is_dir()
    assert "run is finished, but it could not be uploaded to ada/tiny (" in ended.err
    assert "python -m lit_recon.fit resume=run push=ada/tiny" in ended.err and "Traceback" not in ended.err
    assert hub.files["ada/tiny"] == {}, "whole or not at all"
    hub.failing = "nothing at all"
    assert tiny_run("resume=run", "push=ada/tiny").status == 0
    assert_uploaded(hub, "ada/tiny", Path("run"), tmp_path / "read")


@pytest.mark.parametrize("push", ["tiny", "a/b/c", "ada/-tiny", "ada/ti ny", "ada/tiny.git", "x" * 100])
def test_what_is_no_id_of_a_model_is_refused_before_the_hub_is_asked(push: str, hub: HubStandIn) -> None:
    with pytest.raises(ValueError, match="push=.*<owner>/<name>"):
        check_push(push)
    assert hub.asked == []


def test_who_may_not_write_or_is_not_known_is_refused_before_the_run(
    tiny_run: Callable[..., Ended], hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.role = "read"
    with pytest.raises(ValueError, match="token of ada may only read"):
        check_push("ada/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    ended = tiny_run("push=ada/tiny", "seed=-1")
    assert ended.status == 2 and not Path("run").exists()
    assert "the Hub does not say who is logged in" in ended.err and "hf auth login" in ended.err
    assert "seed=-1" in ended.err, "all problems at once"


def test_a_hub_that_is_switched_off_or_silent_is_told(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        check_push("ada/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="does not say who is logged in"):
        check_push("ada/tiny")
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_file", lambda: None)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="log in with hf auth login"):
        check_push("ada/tiny")


def test_runs_of_a_sweep_are_not_all_uploaded_to_one_place(command: Callable[..., Ended], hub: HubStandIn) -> None:
    ended = command("-m", "seed=1,2", "push=ada/tiny", "output_dir=run-${seed}")
    assert ended.status == 2 and "push=ada/tiny is one model of the Hub" in ended.err and hub.asked == []
