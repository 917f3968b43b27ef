"""A resumed run has the configuration of its folder, damaged or not, and nothing runs that only that folder names."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended
from omegaconf import OmegaConf

from lit_recon.fit.resume_config import saved_config
from lit_recon.fit.signature import OF_ONE_CALL
from lit_recon.system.commits import Commits

DAMAGED = {
    "empty": "",
    "zeros": "\0" * 200,
    "a list": "- 1\n- 2\n",
    "a number": "5\n",
    "a tab": "a:\n\tb: 1\n",
    "an alias": "a: *b\n",
    "half": None,
}


def folder_of(tmp_path: Path, content: str) -> Path:
    """A run of which one window was done, with this configuration."""
    (tmp_path / "config.yaml").write_text(content)
    commits = Commits(tmp_path / "commits")
    commits.commit(1, {"signature": {"config": {"seed": 7}}}, [])
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_configuration_is_that_of_the_newest_commit(damage: str, tmp_path: Path) -> None:
    content = "seed: 1\nmodel: {name: 'a" if DAMAGED[damage] is None else DAMAGED[damage]
    assert saved_config(folder_of(tmp_path, content), "config.yaml") == {"seed": 7}
    for path in (tmp_path / "commits").iterdir():
        path.unlink()
    for said in ("windows were done, but .* holds no commit any more", "no window was done"):
        with pytest.raises(ValueError, match=rf"^resume=\S*: config\.yaml is damaged \(.*, and {said}.*overwrite=true"):
            saved_config(tmp_path, "config.yaml")
        (tmp_path / "commits.begun").unlink(missing_ok=True)


@pytest.mark.parametrize("damage", ["half"])
def test_a_run_with_a_damaged_configuration_is_resumed_or_refused_in_one_message(
    run_once: Callable[..., Ended], command: Callable[..., Ended], damage: str
) -> None:
    run_once("stop_after=1")
    whole = Path("run/config.yaml").read_text()
    Path("run/config.yaml").write_text(whole[: len(whole) // 2] if damage == "half" else DAMAGED[damage] or "")
    damaged = Path("run/config.yaml").read_bytes()
    ended = command("resume=run", "plan=true")
    assert ended.status == 0, ended.err
    assert "config.yaml is damaged" in ended.out and Path("run/config.yaml").read_bytes() == damaged
    ended = command("resume=run", "stop_after=2")
    assert ended.status == 0 and "config.yaml is damaged" in ended.out, ended.err
    mended, before = OmegaConf.load("run/config.yaml"), OmegaConf.create(whole)
    assert {key: value for key, value in mended.items() if key not in OF_ONE_CALL} == {
        key: value for key, value in before.items() if key not in OF_ONE_CALL
    }
    Path("run/config.yaml").write_bytes(damaged)
    for path in Path("run/commits").iterdir():
        path.unlink()
    ended = command("resume=run")
    assert ended.status == 2 and "resume=run: config.yaml is damaged" in ended.err and "Traceback" not in ended.err


def test_another_output_folder_is_refused(run_once: Callable[..., Ended], command: Callable[..., Ended]) -> None:
    run_once("stop_after=1")
    ended = command("resume=run", "output_dir=other")
    assert ended.status == 2 and "resume=run output_dir=other" in ended.err
