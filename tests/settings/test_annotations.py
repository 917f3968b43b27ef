"""A setting of another type than its class says is told in words; a user's own class may be sloppy."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from lightning import Trainer
from torch.optim import AdamW

from lit_recon.data.files import Files
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.settings.annotations import fits, in_words, wrong_types


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (False, float, False),
        (None, int | None, True),
        ("a", int | None, False),
        (["a"], str | Sequence[str], True),
        ([1], str | Sequence[str], False),
        (5, str | Sequence[str], False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (len, Callable[..., int], True),
        ("len", Callable[..., int], False),
        ([0.9, 1], tuple[float, float], True),
        (object(), Any, True),
    ],
)
def test_values_fit_types(value: object, hint: Any, expected: bool) -> None:
    assert fits(value, hint) == expected


class Own:
    """A class that asks for a path and is given a text."""

    def __init__(self, path: Path) -> None: ...


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (partial(MaskedWeights, loss="abc"), ["x.loss=abc: expected a function or class"]),
        (partial(MaskedWeights, loss=None), ["x.loss=null: expected a function or class"]),
        (partial(MaskedWeights, optimizer=partial(AdamW, lr="abc")), ["x.optimizer.lr=abc: expected a number"]),
        (partial(Trainer, callbacks=[1]), ["x.callbacks=[1]: expected null or a list"]),
        (partial(Trainer, log_every_n_steps=0, max_epochs=None), []),
        (partial(Files, paths=5), ["x.paths=5: expected a text or a list, each a text"]),
        (partial(Own, path="a.txt"), []),
    ],
)
def test_a_wrong_type_is_told_with_its_setting(make: "partial[Any]", told: list[str]) -> None:
    found = list(wrong_types(make, "x"))
    assert len(found) == len(told) and all(one.startswith(said) for one, said in zip(found, told, strict=True)), found


def test_types_in_words() -> None:
    assert in_words(int | None) == "a whole number or null"
    assert in_words(bool) == "true or false"
    assert in_words(str | Sequence[str]) == "a text or a list, each a text"
