"""Libraries are quiet, but what fails is told."""

import threading
import warnings

import pytest

from lit_recon.system.quiet_libraries import quiet


def test_a_thread_that_fails_is_told_unless_the_disk_failed_which_tensorboard_tells_the_main_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back at the end
    monkeypatch.setattr(threading, "__excepthook__", lambda failure: told.append(failure.exc_type))
    with warnings.catch_warnings():
        quiet()
    for error in (OSError(28, "No space left on device"), KeyError("a mistake")):

        def fail(error: Exception = error) -> None:
            raise error

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert told == [KeyError]
