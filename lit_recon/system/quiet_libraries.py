"""Libraries kept from saying once per window what is decided once per run, or does not concern the user."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

LOGGERS = {
    "lightning.pytorch": logging.WARNING,
    "lightning.fabric": logging.WARNING,
    "tensorboard": logging.ERROR,  # reading curves back, it says where the file ends
}


@contextmanager
def quietly() -> Iterator[None]:
    """A context in which libraries are `quiet`, for a process that is not ours."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels, excepthook = [one.level for one in loggers], threading.excepthook
    with warnings.catch_warnings():
        quiet()
        try:
            yield
        finally:
            threading.excepthook = excepthook
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def quiet() -> None:
    """Set log levels and filters of libraries, once per process."""
    for name, level in LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    for message in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*`LightningModule.configure_optimizers` returned `None`.*",  # exact solutions need none
        ".*module\\(s\\) in eval mode at the start of training.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)
    threading.excepthook = _tell_of_thread


def _tell_of_thread(failure: threading.ExceptHookArgs) -> None:
    """Print what ended a thread; but TensorBoard's hands errors of the disk to the main thread, which reports them."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without transformers' bars for work on local files: seconds long, and in the way of the run's own display."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def no_load_report() -> Iterator[None]:
    """Without transformers' table of tensors that are missing or left out, which the caller tells of."""
    logger = logging.getLogger("transformers.modeling_utils")
    before, logger.disabled = logger.disabled, True  # by a higher level it would tell of layers that are not sharded
    try:
        yield
    finally:
        logger.disabled = before
