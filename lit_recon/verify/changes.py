"""Changes of tensors from those of the dense model: pruned weights, kept weights that differ, all else that differs.

Two tensors are compared in the wider of their dtypes, some numbers at a time. Names and shapes may differ as they do
between files that transformers loads into the same model (layout.py).
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_recon.model.mapped_files import DenseFiles
from lit_recon.system.tensor_files import DTYPES
from lit_recon.verify.layout import Layout, shapes_of
from lit_recon.verify.quantised import FLOATS
from lit_recon.verify.zeros import CHUNK


@dataclass
class Change:
    """How a tensor differs from that of the dense model.

    Attributes:
        name: Its name in the files.
        dtypes: Its dtype and the dense one's, in the words of the format.
        is_matrix: Whether it is a matrix of a layer.
        numbers: How many it holds.
        pruned: Numbers that are zero, where the dense model's are not.
        kept: Numbers that are not zero and differ from the dense model's.
        largest: Largest absolute difference of these.
        is_rounding: Whether rounding to the narrower dtype explains all differences.
    """

    name: str
    dtypes: tuple[str, str]
    is_matrix: bool
    numbers: int = 0
    pruned: int = 0
    kept: int = 0
    largest: float = 0.0
    is_rounding: bool = True


@dataclass
class Comparison:
    """What a folder's tensors are to those of the dense model.

    Attributes:
        same: Tensors with the same values.
        changes: Tensors that differ, or have another dtype.
        mismatched: What cannot be compared, and why.
        only_here: Tensors that the dense model lacks.
        only_dense: Tensors that the folder lacks.
    """

    same: int = 0
    changes: list[Change] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    only_here: list[str] = field(default_factory=list)
    only_dense: list[str] = field(default_factory=list)

    def add(self, change: Change, here: Tensor, dense: Tensor) -> None:
        """Compare one tensor, and note what differs in `change`."""
        if here.shape != dense.shape:
            self.mismatched.append(f"{change.name}: shape {tuple(here.shape)}, of the dense model {tuple(dense.shape)}")
            return
        compare(change, here, dense)
        differs = bool(change.pruned or change.kept)
        self.same += not differs
        if differs or change.dtypes[0] != change.dtypes[1]:
            self.changes.append(change)


def compare(change: Change, here: Tensor, dense: Tensor) -> None:
    """Note how two tensors of one shape differ; what is not a number in both is the same."""
    change.numbers = here.numel()
    wide = torch.promote_types(here.dtype, dense.dtype) if here.dtype != dense.dtype else here.dtype
    narrow = min(here.dtype, dense.dtype, key=lambda dtype: dtype.itemsize)
    for here_N, dense_N in zip(here.reshape(-1).split(CHUNK), dense.reshape(-1).split(CHUNK), strict=True):
        one_N, other_N = here_N.to(wide), dense_N.to(wide)
        differs_N = _differ(one_N, other_N)
        if not bool(differs_N.any()):
            continue
        change.is_rounding &= not bool(_differ(here_N.to(narrow), dense_N.to(narrow)).any())
        is_kept_N = differs_N & (one_N != 0)
        kept = int(torch.count_nonzero(is_kept_N))
        change.pruned += int(torch.count_nonzero(differs_N)) - kept
        change.kept += kept
        if kept:
            apart = (one_N[is_kept_N].double() - other_N[is_kept_N].double()).abs().max().item()
            change.largest = math.nan if math.isnan(apart) else max(change.largest, apart)


def _differ(one_N: Tensor, other_N: Tensor) -> Tensor:
    return (one_N != other_N) & ~((one_N != one_N) & (other_N != other_N))  # NaN is not equal to itself


def compare_all(here: DenseFiles, layout: Layout, dense: DenseFiles) -> Comparison:
    """Compare all tensors of two models' files.

    Args:
        here: The files that are looked at.
        layout: Theirs.
        dense: Those of the dense model.
    """
    found, matrices = Comparison(), {part.name for place in layout.places for part in place.parts}
    layout_dense, seen = Layout(shapes_of(dense), layout.skeleton), set[str]()
    left = []
    for name in here.names:
        stored = layout_dense.stored({name: _tensor(here, name)}) or {}
        left += [] if stored else [name]
        for other, values in stored.items():
            label = name if len(stored) == 1 else other
            change = Change(label, (here.kind(name)[0], dense.kind(other)[0]), name in matrices)
            _add(found, change, values, _tensor(dense, other))
        seen |= stored.keys()
    for name in (name for name in dense.names if name not in seen):
        stored = layout.stored({name: _tensor(dense, name)}) or {}
        found.only_dense += [] if stored else [name]
        for other, values in stored.items():
            change = Change(other, (here.kind(other)[0], dense.kind(name)[0]), other in matrices)
            _add(found, change, _tensor(here, other), values)
        left = _without(left, stored)
    found.only_here = left
    return found


def _tensor(files: DenseFiles, name: str) -> Tensor:
    """A tensor, mapped; an empty one of a dtype that torch lacks, which is not compared."""
    readable = files.kind(name)[0] in DTYPES.values()
    return files.tensors([name])[name] if readable else torch.empty(0)


def _add(found: Comparison, change: Change, here: Tensor, dense: Tensor) -> None:
    """Compare one tensor if its dtypes can be compared: codes say nothing without their scales."""
    both = set(change.dtypes)
    if both <= set(FLOATS) or (len(both) == 1 and both <= set(DTYPES.values())):
        found.add(change, here, dense)
    else:
        found.mismatched.append(f"{change.name}: {change.dtypes[0]}, of the dense model {change.dtypes[1]}")


def _without(names: list[str], others: Collection[str]) -> list[str]:
    return [name for name in names if name not in others] if others else names
