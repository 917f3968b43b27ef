"""What a run reads does not lie in what it clears."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, content


def said(text: str) -> str:
    """What was said, without the breaks of lines."""
    return " ".join(text.split())


def test_what_a_run_reads_does_not_lie_in_what_it_clears(
    run_once: Callable[..., Ended], tiny_run: Callable[..., Ended], text_file: Path
) -> None:
    run_once()
    run = Path("run").absolute()
    shutil.copy(text_file, run / "figures.txt")
    (run / "figures").mkdir()
    shutil.copy(text_file, run / "figures" / "words.txt")
    Path("linked").mkdir()
    for path in (run / "checkpoint").iterdir():
        (Path("linked") / path.name).symlink_to(path)
    Path("whole").symlink_to(run / "checkpoint")
    before = content(run)
    for model in ("run/checkpoint", str(run / "checkpoint"), "linked", "whole", "linked/../run/checkpoint"):
        for overwrite in (["overwrite=true"], []):
            ended = tiny_run(f"model.name={model}", *overwrite, "sparsity=0.8")
            assert ended.status == 2 and f"model.name={model} lies in run/checkpoint, which a run in" in said(ended.err)
    for text in ("data.paths=[run/figures/words.txt]", "data.evaluation_paths=run/figures/*.txt"):
        ended = tiny_run(text, "overwrite=true")
        assert ended.status == 2 and "lies in run/figures" in ended.err, ended
    assert content(run) == before
    assert tiny_run("data.paths=[run/figures.txt]", "overwrite=true").status == 0, "is not removed"


READ = {  # each with what is refused
    "its masks": (["criterion=file", "criterion.masks=run/masks.safetensors"], "criterion.masks=", "masks.safetensors"),
    "its sparse model": (["criterion=zeros", "criterion.name=run/checkpoint"], "criterion.name=", "checkpoint"),
    "a data set": (["data=hub", "data.name=run/figures"], "data.name=", "figures"),
    "a data set for evaluation": (
        ["data=hub", "data.name=elsewhere", "data.evaluation={name: run/figures/texts}"],
        "data.evaluation.name=",
        "figures",
    ),
    "a text of a mixture": (
        ["data=mixture", "data@data.sources.other=files", "data.sources.other.paths=[run/figures/texts]"],
        "data.sources.other.paths",
        "figures",
    ),
    "a file of classes": (
        ["criterion=custom", "criterion._target_=run.figures.mine.Mine"],
        "_target_=run.figures.mine.Mine=",
        "figures",
    ),
    "a file of functions": (["loss=custom", "loss._target_=run.figures.mine.loss"], "_target_=", "figures"),
}


@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("link", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "by a link"])
def test_nor_does_anything_else_that_its_configuration_names(
    run_once: Callable[..., Ended],
    tiny_run: Callable[..., Ended],
    text_file: Path,
    what: str,
    link: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_once()
    words, setting, cleared = READ[what]
    (Path("run/figures") / "texts").mkdir(parents=True)
    shutil.copy(text_file, "run/figures/texts/words.txt")
    own = "from lit_recon.pruning.criteria.magnitude import Magnitude as Mine\nfrom torch import Tensor\n"
    own = "from lit_recon.modules.losses import mean_squared\n"
    own += "from lit_recon.pruning.criteria.magnitude import Magnitude\n\n\nclass Mine(Magnitude):\n    pass\n\n\n"
    own += "def loss(outputs_ND, targets_ND, **others):\n    return mean_squared(outputs_ND, targets_ND, **others)\n"
    Path("run/figures/mine.py").write_text(own)
    if link:
        Path("other").symlink_to("run")
        words = [word.replace("run", "other") for word in words]
    before = content(Path("run"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("run", "other")]:  # folders of other tests
        monkeypatch.delitem(sys.modules, name)
    ended = tiny_run(*words, "overwrite=true")
    assert ended.status == 2 and setting.replace("run.", "other." if link else "run.") in ended.err, ended
    assert f"lies in run/{cleared}, which a run in output_dir=run replaces" in said(ended.err), ended.err
    assert content(Path("run")) == before


def test_nor_does_the_cache(
    run_once: Callable[..., Ended], tiny_run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_once()
    Path("linked").symlink_to("run/tensorboard")
    before = content(Path("run"))
    for folder in ("run/tensorboard", "run/tensorboard/cache", "linked", "run/checkpoint"):
        monkeypatch.setenv("LIT_RECON_CACHE", folder)
        ended = tiny_run("overwrite=true")
        assert ended.status == 2 and "LIT_RECON_CACHE=" in ended.err, ended
        assert f"lies in run/{'checkpoint' if 'checkpoint' in folder else 'tensorboard'}" in said(ended.err), ended
    assert content(Path("run")) == before
    monkeypatch.setenv("LIT_RECON_CACHE", "run/cache")  # is not cleared
    assert tiny_run("overwrite=true", "sparsity=0.6").status == 0
