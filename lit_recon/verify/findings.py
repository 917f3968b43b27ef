"""Findings on a folder: goes through it tensor by tensor, and says whether what was asked holds.

No more than one tensor and its mask are looked at, mapped from their files; where files hold a mixture's experts apart,
the masks of all experts of a matrix. What the zeros of a matrix are: zeros.py.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from lit_recon.model.mapped_files import DenseFiles
from lit_recon.pruning.masks import Masks
from lit_recon.verify.changes import Comparison, compare_all
from lit_recon.verify.folder import open_weights, read_layout
from lit_recon.verify.layout import Layout, Part
from lit_recon.verify.quantised import CODES, FLOATS
from lit_recon.verify.request import Request
from lit_recon.verify.zeros import CHUNK, Pattern, Zeros, look_at


@dataclass(frozen=True)
class Found:
    """One tensor that is a matrix, or a part of one.

    Attributes:
        part: Which tensor.
        shape: Its shape.
        dtype: In the words of the format.
        zeros: Its zeros.
    """

    part: Part
    shape: tuple[int, ...]
    dtype: str
    zeros: Zeros


@dataclass(frozen=True)
class Verdict:
    """Whether something that was asked for holds.

    Attributes:
        asked: The option.
        holds: Whether it does.
        says: What was found, in words.
    """

    asked: str
    holds: bool
    says: str


@dataclass
class Findings:
    """What a folder's zeros are.

    Attributes:
        request: What was asked.
        remarks: What is to be known about how it was found out.
        matrices: Its matrices.
        lacking: Masks of matrices that the folder does not have.
        misfits: Masks that do not fit their matrices, and why.
        other_numbers: Floating-point numbers in all other tensors.
        other_zeros: Zeros among these.
        comparison: With the dense model.
    """

    request: Request
    _: KW_ONLY
    remarks: list[str] = field(default_factory=list)
    matrices: list[Found] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    other_numbers: int = 0
    other_zeros: int = 0
    comparison: Comparison | None = None

    @property
    def pattern(self) -> Pattern | None:
        """The pattern that was asked for."""
        return None if self.request.pattern is None else Pattern(*self.request.pattern)

    @property
    def concerned(self) -> list[Found]:
        """Matrices that pattern and sparsity are asked of: those with masks, or all."""
        masked = [found for found in self.matrices if found.zeros.masked is not None]
        return self.matrices if self.request.masks is None else masked

    @property
    def patterns(self) -> list[Pattern]:
        """Patterns that hold in all matrices that are asked."""
        first, *others = [found.zeros.patterns for found in self.concerned] or [()]
        return [pattern for pattern in first if all(pattern in other for other in others)]

    @property
    def total_sparsity(self) -> float:
        """Share of zeros of all floating-point numbers in the folder."""
        zeros = self.other_zeros + sum(found.zeros.zeros for found in self.matrices)
        return zeros / max(1, self.other_numbers + sum(found.zeros.weights for found in self.matrices))

    def verdicts(self) -> list[Verdict]:
        """What holds of all that was asked."""
        verdicts = [] if self.request.masks is None else [self._of_masks()]
        verdicts += [] if self.pattern is None else [self._of_pattern(self.pattern)]
        return verdicts + ([] if self.request.sparsity is None else [self._of_sparsity(self.request.sparsity)])

    def _of_masks(self) -> Verdict:
        right = [found for found in self.concerned if not found.zeros.masked_nonzero]
        count = sum(found.zeros.masked_nonzero or 0 for found in self.concerned)
        problems = [f"not zero: {count:,}"] if count else []
        problems += [f"masks of matrices that the folder lacks: {len(self.lacking)}"] if self.lacking else []
        problems += [f"masks that do not fit: {len(self.misfits)}"] if self.misfits else []
        problems += [] if self.concerned or problems else ["no masks"]
        said = f" ({', '.join(problems)})" if problems else ""
        return Verdict("masks", not problems, f"masked weights are zero in {_of(right, self.concerned)}{said}")

    def _of_pattern(self, pattern: Pattern) -> Verdict:
        right = [found for found in self.concerned if found.zeros.over == 0]
        holds = len(right) == len(self.concerned) > 0
        return Verdict("pattern", holds, f"{pattern} in {_of(right, self.concerned)}")

    def _of_sparsity(self, least: float) -> Verdict:
        share = sparsity(self.concerned)
        holds = share >= least - self.request.tolerance
        return Verdict("sparsity", holds, f"sparsity {share:.6g}, where {least:.6g} is asked for")


def sparsity(matrices: list[Found]) -> float:
    """Share of zeros of matrices together."""
    return sum(found.zeros.zeros for found in matrices) / max(1, sum(found.zeros.weights for found in matrices))


def _of(some: list[Found], matrices: list[Found]) -> str:
    return f"{len(some)} of {len(matrices)} matrices"


def examine(request: Request) -> Findings:
    """Go through a folder.

    Raises:
        ValueError: Files cannot be read, or zeros cannot be told from them.
    """
    findings = Findings(request)
    masks = Masks() if request.masks is None else _read_masks(request.masks)
    files = open_weights(request.folder)
    layout, findings.remarks = read_layout(request.folder, files, _shapes(masks))
    if request.note:
        findings.remarks.insert(0, request.note)
    findings.lacking = [name for name in layout.lacking if name in masks]
    if absent := [name for name in layout.lacking if name not in masks]:
        findings.remarks.append(
            f"Matrices of the architecture that the folder lacks: {len(absent)}, such as {absent[0]}"
        )
    for part, mask in _parts(layout, masks, findings.misfits):
        dtype, shape = files.kind(part.name)
        if mask is not None and mask.shape != shape:
            findings.misfits.append(f"{part.name}: its mask is {tuple(mask.shape)}, and it is {shape}")
            mask = None
        weight = files.tensors([part.name])[part.name]
        zeros = look_at(weight, part.input_dim, asked=findings.pattern, mask=mask)
        findings.matrices.append(Found(part, shape, dtype, zeros))
    _note_codes(findings)
    _count_others(findings, files)
    if request.dense is not None:
        findings.comparison = compare_all(files, layout, open_weights(request.dense))
    return findings


def _parts(layout: Layout, masks: Masks, misfits: list[str]) -> Iterator[tuple[Part, Tensor | None]]:
    """The tensors that are matrices, each with its mask; masks that do not fit are noted in `misfits`."""
    for place in layout.places:
        there = {name: masks[name] for name in place.matrices if name in masks}
        shapes = {name: layout.shapes[name][0] for name in there}
        wrong = [name for name, mask in there.items() if tuple(mask.shape) != shapes[name]]
        misfits += [f"{name}: its mask is {tuple(there[name].shape)}, and it is {shapes[name]}" for name in wrong]
        stored = (layout.stored(there) if there and not wrong else None) or {}
        if there and not wrong and not {part.name for part in place.parts} <= stored.keys():
            misfits.append(f"{', '.join(there)}: in one tensor with matrices that have no masks")
        for part in place.parts:
            yield part, stored.get(part.name)


def _shapes(masks: Masks) -> dict[str, tuple[int, ...]]:
    shapes = json.loads(masks.metadata()["shapes"])
    return {name: tuple(shape) for name, shape in shapes.items()}


def _read_masks(path: Path) -> Masks:
    """Masks of a file.

    Raises:
        ValueError: It is no file of masks.
    """
    try:
        masks = Masks.load(path)
        for name, bits in masks.tensors().items():
            shape = _shapes(masks)[name]
            if len(shape) not in (2, 3) or bits.dtype != torch.uint8 or len(bits) != -(-math.prod(shape) // 8):
                raise ValueError(f"{name} has {tuple(bits.shape)} bytes for a mask of shape {shape}")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"--masks {path}: no masks as lit_recon writes them ({said}); expected the masks.safetensors of a run."
        ) from error
    return masks


def _note_codes(findings: Findings) -> None:
    """Say that codes of quantised weights were looked at."""
    codes = [found for found in findings.matrices if found.dtype in CODES]
    if codes:
        kinds = ", ".join(sorted({found.dtype for found in codes}))
        findings.remarks.append(f"Quantised matrices: {len(codes)} ({kinds}); a code of 0 is taken for a weight of 0")


def _count_others(findings: Findings, files: DenseFiles) -> None:
    """Count numbers and zeros of all tensors that are no matrices."""
    seen = {found.part.name for found in findings.matrices}
    for name in files.names:
        if name not in seen and files.kind(name)[0] in FLOATS:
            numbers = files.tensors([name])[name].reshape(-1)
            findings.other_numbers += len(numbers)
            for chunk in numbers.split(CHUNK):
                findings.other_zeros += len(chunk) - int(torch.count_nonzero(chunk))
