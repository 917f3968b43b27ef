"""Changes of tensors from those of the dense model: pruned weights, kept weights that differ, all else that differs.

Two tensors are compared in the wider of their dtypes, some numbers at a time. Names and shapes may differ as they do
between files that transformers loads into the same model (layout.py).
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from lit_recon.model.mapped_files import DenseFiles
from lit_recon.system.tensor_files import DTYPE_NAMES
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
    _: KW_ONLY
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

    def add(self, change: Change, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Compare a tensor, or all of its parts, with the dense model's, and note what differs in `change`."""
        here, dense = change.dtypes
        # codes of quantised weights say nothing without their scales
        if not {here, dense} <= set(FLOATS) and not (here == dense and here in DTYPE_NAMES.values()):
            self.mismatched.append(f"{change.name}: {here}, of the dense model {dense}")
            return
        for one, other in pairs:
            if one.shape != other.shape:
                shapes = f"shape {tuple(one.shape)}, of the dense model {tuple(other.shape)}"
                self.mismatched.append(f"{change.name}: {shapes}")
                return
        for one, other in pairs:
            compare(change, one, other)
        differs = bool(change.pruned or change.kept)
        self.same += not differs
        if differs or here != dense:
            self.changes.append(change)


def compare(change: Change, here: Tensor, dense: Tensor) -> None:
    """Count how two tensors of one shape differ, in `change`; what is not a number in both is the same."""
    change.numbers += here.numel()
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
    layout_dense, seen_here, seen_dense = Layout(shapes_of(dense), layout.skeleton), set[str](), set[str]()
    for name in here.names:
        if stored := layout_dense.stored({name: _tensor(here, name)}):
            seen_here.add(name)
            seen_dense |= stored.keys()
            change = Change(name, (here.kind(name)[0], dense.kind(next(iter(stored)))[0]), name in matrices)
            found.add(change, [(values, _tensor(dense, other)) for other, values in stored.items()])
    for name in (name for name in dense.names if name not in seen_dense):
        stored = layout.stored({name: _tensor(dense, name)})  # one tensor of the dense model, parts here
        found.only_dense += [] if stored else [name]
        for other, values in (stored or {}).items():
            seen_here.add(other)
            change = Change(other, (here.kind(other)[0], dense.kind(name)[0]), other in matrices)
            found.add(change, [(_tensor(here, other), values)])
    found.only_here = [name for name in here.names if name not in seen_here]
    return found


def _tensor(files: DenseFiles, name: str) -> Tensor:
    """A tensor, mapped; an empty one of a dtype that torch lacks, which is not compared."""
    readable = files.kind(name)[0] in DTYPE_NAMES.values()
    return files.tensors([name])[name] if readable else torch.empty(0)
