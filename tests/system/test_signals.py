"""Signals: Ctrl-C and SIGTERM stop a run at once, but not inside of a commit."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_recon.system.signals import SAME_REQUEST, SIGNALS, Terminated, protected, stoppable

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals that others can send")
EACH = pytest.mark.parametrize("number", SIGNALS)

FIT = """
import signal, sys, threading, time
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader
from lit_recon.reconstruction.window_fit import _interruptible
from lit_recon.system.signals import Terminated, stoppable

class Endless(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch):
        if self.global_step == 3:
            print("running", flush=True)
        time.sleep(0.01)
        return self.layer(batch).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def fit(max_epochs):
    trainer = Trainer(max_epochs=max_epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)
    with _interruptible():
        trainer.fit(Endless(), DataLoader(torch.ones(4, 2), batch_size=2))

def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

before = handlers()
for again in range(2):
    with stoppable():
        ours = handlers()
        if not again:
            fit(1)
            assert handlers() == ours, handlers()
        try:
            fit(-1)
        except KeyboardInterrupt as stop:
            print("stopped", type(stop).__name__, str(stop), flush=True)
        assert handlers() == ours, handlers()
assert handlers() == before
"""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Each test leaves the handlers that it found."""
    found = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == found


def test_signals_stop_a_fit_of_lightning_within_a_second() -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", FIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for number, expected in (
        (signal.SIGTERM, "stopped Terminated"),
        (signal.SIGINT, "stopped KeyboardInterrupt"),
    ):
        assert process.stdout.readline() == "running\n"
        sent = time.monotonic()
        process.send_signal(number)
        assert process.stdout.readline().strip() == expected
        assert time.monotonic() - sent < 2
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@EACH
def test_a_signal_is_raised_where_the_program_is(number: int) -> None:
    after = False
    with pytest.raises(KeyboardInterrupt) as stop, stoppable():
        signal.raise_signal(number)
        after = True
    assert not after
    assert (stop.type is Terminated) == (number != signal.SIGINT)
    assert str(stop.value) == ""  # what is kept, and how to resume, is the same for all


@EACH
def test_signals_wait_for_the_end_of_the_outermost_protected_section(number: int) -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), stoppable():
        with protected():
            with protected():
                signal.raise_signal(number)
                steps.append("inner")
                signal.raise_signal(number)  # a second one waits too
            steps.append("outer")
        steps.append("after")
    assert steps == ["inner", "outer"]


def test_a_protected_section_without_a_signal_changes_nothing() -> None:
    with stoppable():
        with protected():
            pass
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_error_in_a_protected_section_comes_first() -> None:
    steps = []
    with pytest.raises(Terminated), stoppable():
        with pytest.raises(OSError, match="full"), protected():
            signal.raise_signal(signal.SIGTERM)
            raise OSError("full")
        steps.append("handled")
        with protected():
            steps.append("next section")
        steps.append("after")
    assert steps == ["handled", "next section"]


def test_a_signal_that_is_sent_twice_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GNU timeout does: the second must not end what the first one's handling writes."""
    now = time.monotonic()
    steps = []
    with pytest.raises(Terminated), stoppable():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            steps.append("written")
    assert steps == ["written"]
    with pytest.raises(Terminated), stoppable():  # another run in the same process
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stoppable():
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(time, "monotonic", lambda: now + 2 * SAME_REQUEST + 60)
        signal.raise_signal(signal.SIGINT)


def test_a_request_does_not_outlive_its_run() -> None:
    with pytest.raises(OSError, match="full"), stoppable(), protected():
        signal.raise_signal(signal.SIGINT)
        raise OSError("full")
    with protected():
        pass
    with stoppable(), protected():
        pass


def test_handlers_come_back_also_after_an_error() -> None:
    mine = []
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: mine.append(number))
    try:
        with pytest.raises(RuntimeError, match="of the run"), stoppable():
            raise RuntimeError("of the run")
        signal.raise_signal(signal.SIGTERM)
        assert mine == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, earlier)


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As nohup has it."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, earlier)


HANGUP = """
import os, sys
from lit_recon.system.signals import stoppable
try:
    with stoppable():
        print("running", flush=True)
        while True:
            pass
except KeyboardInterrupt:
    print("of which nobody can read a word", flush=True)
    open(sys.argv[1], "w").write("kept")
"""


def test_what_is_kept_when_a_terminal_is_closed_is_written(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", HANGUP, str(tmp_path / "kept")], stdin=theirs, stdout=theirs, start_new_session=True
    )
    os.close(theirs)
    said = b""
    while not said.endswith(b"\n"):  # an unbuffered print writes it, and the end of its line, one after the other
        said += os.read(ours, 100)
    assert said.startswith(b"running")
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(10) == 0
    assert (tmp_path / "kept").read_text() == "kept"


def test_other_threads_are_left_alone() -> None:
    found = []

    def work() -> None:
        with stoppable(), protected():
            found.append(signal.getsignal(signal.SIGTERM))

    with stoppable():
        thread = threading.Thread(target=work)
        before = signal.getsignal(signal.SIGTERM)
        thread.start()
        thread.join()
        assert found == [before]
        with pytest.raises(Terminated):  # not protected by the other thread's section
            signal.raise_signal(signal.SIGTERM)
