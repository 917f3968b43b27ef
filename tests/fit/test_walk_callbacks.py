"""The progress bar of a walk: a bar on a terminal and in a notebook with widgets, else a line per window; or none."""

import io
import logging
import sys
import types
from functools import partial
from pathlib import Path

import pytest
from conftest import letter_tokenizer
from rich.console import Console
from torch.optim import AdamW

from lit_recon import Files, MaskedWeights, prune_and_reconstruct
from lit_recon.fit.walk_callbacks import ProgressBar
from lit_recon.model.architectures import tiny_model
from lit_recon.reconstruction.window_result import WindowResult

LINE = "1/2 block_00 [x]: held-out error 0.5 -> 0.25, "


def result(name: str) -> WindowResult:
    """A window whose error was halved."""
    errors = {"relative_error_before": 0.5, "relative_error_after": 0.25, "held_out_before": 0.5}
    return WindowResult(name=name, **errors, held_out_after=0.25, accepted=True, steps=4, seconds=1.0)


def shown(console: Console, **settings: object) -> ProgressBar:
    """A bar that has gone over one of two windows."""
    with ProgressBar(console, 2, **settings) as bar:
        bar.on_window_fit(result("block_00 [x]"))
        bar._progress.refresh()
    return bar


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a notebook displays as text."""
    found: list[str] = []
    monkeypatch.setattr("rich.jupyter.display", lambda segments, text: found.append(text))
    return found


class Output:
    """The widget of a notebook in which something is shown again and again."""

    made: list["Output"] = []

    def __init__(self) -> None:
        self.times, self.open = 0, False
        self.made.append(self)

    def __enter__(self) -> None:
        self.times, self.open = self.times + 1, True

    def __exit__(self, *_: object) -> None:
        self.open = False

    def clear_output(self, wait: bool) -> None:
        """Take away what was shown."""


def test_on_a_terminal_there_is_a_bar_and_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lit_recon")
    said = io.StringIO()
    shown(Console(file=said, force_terminal=True, width=100))
    assert "━" in said.getvalue() and "block_00 [x]" in said.getvalue() and "1/2" in said.getvalue()
    assert not caplog.messages


def test_in_a_file_there_is_a_line_for_each_window_and_no_bar(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lit_recon")
    said = io.StringIO()
    shown(Console(file=said, width=100))
    (line,) = caplog.messages
    assert line.startswith(LINE) and line.endswith(" left") and not said.getvalue().strip()


def test_of_windows_that_are_done_together_only_the_last_line_counts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lit_recon")
    bar = shown(Console(file=io.StringIO()), together=True)
    bar.on_window_end(types.SimpleNamespace(name="block_00"), {}, [result("a"), result("b")])
    first, second = caplog.messages
    assert first.startswith("block_00 [x]: held-out") and second == "2/2 windows are done: those of block_00"


def test_a_notebook_without_widgets_shows_a_line_for_each_window(
    displayed: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="lit_recon")
    monkeypatch.setattr("lit_recon.fit.walk_callbacks.find_spec", lambda name: None)
    shown(Console(force_jupyter=True, width=100))
    (line,) = displayed
    assert line.startswith(LINE) and not caplog.messages


def test_a_notebook_with_widgets_shows_a_bar_in_one_and_no_line(
    displayed: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="lit_recon")
    widgets, shell = types.ModuleType("ipywidgets"), types.ModuleType("IPython.display")
    monkeypatch.setattr(Output, "made", [])
    widgets.Output = Output  # type: ignore
    shell.display = lambda *_: None  # type: ignore
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    monkeypatch.setitem(sys.modules, "IPython.display", shell)
    monkeypatch.setattr("lit_recon.fit.walk_callbacks.find_spec", lambda name: name == "ipywidgets")
    shown(Console(force_jupyter=True, width=100))
    (widget,) = Output.made
    assert widget.times >= 2 and not widget.open
    assert any("━" in text and "block_00 [x]" in text for text in displayed)
    assert not any("held-out error" in text for text in displayed) and not caplog.messages


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_not_to_be_shown_is_not(terminal: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lit_recon")
    said = io.StringIO()
    shown(Console(file=said, force_terminal=terminal), shown=False)
    assert not said.getvalue().strip() and not caplog.messages


@pytest.mark.parametrize("progress", [True, False, None])
def test_the_library_shows_the_bar_unless_it_is_told_not_to(
    progress: bool | None, text_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lit_recon.fit.walk_callbacks")
    said = io.StringIO()
    terminal = partial(Console, file=said, force_terminal=True, force_jupyter=False, width=100)
    monkeypatch.setattr("lit_recon.fit.library.Console", terminal)
    source = Files(paths=str(text_file), num_samples=4, length=16, num_held_out=2, evaluation_length=16)
    given = {} if progress is None else {"progress": progress}
    module = partial(MaskedWeights, optimizer=partial(AdamW, lr=1e-2))
    prune_and_reconstruct(tiny_model("llama"), source.samples(letter_tokenizer(), seed=0), module=module, **given)
    if progress is False:
        assert not said.getvalue().strip()
    else:
        assert "block_02" in said.getvalue() and "3/3" in said.getvalue()
    assert not [one for one in caplog.records if one.name == "lit_recon.fit.walk_callbacks"]
