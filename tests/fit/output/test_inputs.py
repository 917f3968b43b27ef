"""What a run reads does not lie in what it clears."""

import shutil
from collections.abc import Callable
from pathlib import Path

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
