"""Settings of the run itself: their types, texts that look like numbers, and what a command line may say of them."""

import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args, get_origin

import pytest
from conftest import Ended
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from lit_recon.fit.settings import CALL, TEXTS, is_text
from lit_recon.settings.annotations import annotations
from lit_recon.settings.conf import CONF
from lit_recon.settings.values import expand_home

CHOICES = {"packing", "dtype", "bos", "attention"}  # words of a few, none of which is a number


def test_the_settings_of_the_run_are_those_of_the_configuration() -> None:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose("fit")
    assert set(CALL) == {str(key) for key in cfg if not OmegaConf.is_dict(cfg._get_node(key))}


def test_every_text_of_model_and_data_is_known_as_one() -> None:
    for group in ("model", "data"):
        for path in (CONF / group).glob("*.yaml"):
            node = OmegaConf.load(path)
            if OmegaConf.is_missing(node, "_target_") or "_target_" not in node:
                continue
            hints = annotations(get_object(node._target_))
            for name in {str(key) for key in node} - CHOICES - {"_target_", "separator"}:
                hint = hints.get(name)
                if str in (hint, *get_args(hint)) and get_origin(hint) is not Mapping:
                    assert f"{group}.{name}" in TEXTS


def test_sources_of_text_within_another_have_the_same_texts_and_paths() -> None:
    for place in ("data", "data.evaluation", "data.sources.other"):
        assert is_text(f"{place}.paths") and is_text(f"{place}.field") and not is_text(f"{place}.temperature")
    words = ["data=mixture", "data@data.sources.other=files", "data@data.evaluation=files"]
    words += ["data.evaluation.paths=['~/a']", "data.sources.other.paths=['~/b',c]"]
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose("fit", overrides=words)
    expand_home(cfg)
    assert cfg.data.evaluation.paths == [str(Path.home() / "a")]
    assert cfg.data.sources.other.paths == [str(Path.home() / "b"), "c"]


BAD = {
    "output_dir=null": "output_dir=null: expected a text",
    "output_dir=true": "output_dir=true: expected a text",
    "output_dir=nan": "output_dir=nan: expected a text",
    "output_dir=[1,2]": "output_dir=['1', '2']: expected a text",
    "output_dir=": "output_dir='': expected the path",
    "memory_limit=[1,2]": "memory_limit=[1, 2]: expected",
    "seed=???": "seed: has no value",
    "~seed": "~seed",
    "~criterion": "~criterion: a run needs a criterion",
    "seed=${nope}": "seed",
    "seed=1,2": "-m makes a run of each",
    "data.paths=5": "data.paths",
    "resume=true": "resume=true: expected a text",
    "output_dir=~nobody_here/x": "output_dir=~nobody_here/x",
    f"output_dir={'x' * 300}": "File name too long",
    f"resume={'x' * 300}": "File name too long",
    "nope": "nope: expected <setting>=<value>",
    "model=5": "model=5: unknown; choose one of",
}


@pytest.mark.parametrize("word", BAD, ids=lambda word: word[:30])
def test_what_cannot_be_is_told_in_words_without_hydras(tiny_run: Callable[..., Ended], word: str) -> None:
    ended = tiny_run(word)
    assert ended.status == 2 and BAD[word] in ended.err, ended.err
    assert "Error executing job" not in ended.err and "Traceback" not in ended.err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["a=b", "zoë [1]", "2024", 'it\'s $HOME, a "b"'])
def test_a_folder_may_have_any_name_and_can_be_resumed_as_it_is_printed(
    tiny_run: Callable[..., Ended], command: Callable[..., Ended], name: str
) -> None:
    ended = tiny_run(f"output_dir={name}", "stop_after=1")
    assert ended.status == 0, ended.err
    assert [path.name for path in Path().iterdir()] == [name]
    printed = re.search(r"Resume with: python -m lit_recon\.fit (.+) \(about .+ more\)$", ended.out, re.MULTILINE)
    assert printed, ended.out
    ended = command(*shlex.split(printed[1]))
    assert ended.status == 0 and "1 of 3 windows are done" in ended.out, ended
    assert [path.name for path in Path().iterdir()] == [name] and Path(name, "results.json").is_file()


def test_tracebacks_of_refusals_are_shown_on_demand(
    tiny_run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    ended = tiny_run(f"output_dir={'x' * 300}")
    assert ended.status == 2 and "Traceback" in ended.err and "OSError" in ended.err
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_ctrl_c_while_planning_does_not_advise_to_resume(
    tiny_run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_recon.fit.run.load", interrupt)
    ended = tiny_run("plan=true")
    assert ended.status == 1 and ended.err == "interrupted: nothing was written.\n"
