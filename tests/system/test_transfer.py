"""Copies to and from a device: what they hold, in which dtype, and how long memory stays pinned."""

import gc

import pytest
import torch

from lit_recon.system import transfer
from lit_recon.system.transfer import moved, pinned_zeros, put, rows_to

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("rows", [(1, 2), (3, 0, 1), (2,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_those_that_were_asked_for_in_the_dtype_that_they_have(rows: tuple, dtype: torch.dtype) -> None:
    array = torch.arange(24).view(4, 2, 3).to(dtype)
    found = rows_to(array, rows, CPU)
    assert found.dtype == dtype and found.tolist() == [array[row].tolist() for row in rows]
    assert found.data_ptr() != array.data_ptr()
    elsewhere = rows_to(array, rows, META)
    assert (elsewhere.dtype, elsewhere.shape, elsewhere.device) == (dtype, found.shape, META)


def test_what_is_moved_keeps_its_dtype_and_what_is_put_takes_the_targets() -> None:
    assert moved(torch.ones(3, dtype=torch.bfloat16), META).dtype == torch.bfloat16
    target = torch.zeros(2, 3, dtype=torch.bfloat16)
    put(target[1:], torch.tensor([[1.0, 2.0, 1 + 2**-9]]))
    assert target.tolist() == [[0, 0, 0], [1, 2, 1]], "rounded to eight bits"


def test_memory_is_pinned_until_nothing_refers_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: dict[int, int] = {}
    monkeypatch.setattr(transfer, "register", lambda address, size: pinned.update({address: size}) is None)
    monkeypatch.setattr(transfer, "unregister", pinned.pop)
    array = pinned_zeros((3, 4), torch.bfloat16)
    assert array.shape == (3, 4) and array.dtype == torch.bfloat16 and not array.any()
    assert pinned == {array.data_ptr(): 3 * 4 * 2}
    view = array.detach()[1:]
    del array
    gc.collect()
    assert len(pinned) == 1, "a view is left"
    view.fill_(1)
    del view
    gc.collect()
    assert not pinned


def test_memory_that_cannot_be_pinned_is_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "register", lambda address, size: False)
    monkeypatch.setattr(transfer, "unregister", lambda address: pytest.fail("it was not pinned"))
    array = pinned_zeros((2, 2), torch.float32)
    array += 1
    assert array.sum() == 4 and pinned_zeros((0, 2), torch.float32).shape == (0, 2)
