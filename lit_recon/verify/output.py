"""Output of findings: a table for the terminal, one row for a kind of matrix over all layers, and JSON.

Below the table stand the matrices of which something that was asked does not hold, and the verdicts as the last line.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from lit_recon.system.console import Console
from lit_recon.verify.changes import Change, Comparison
from lit_recon.verify.findings import Findings, Found, sparsity
from lit_recon.verify.zeros import strongest

LISTED = 12  # lines of one sort, without --all
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def print_findings(findings: Findings, *, every: bool = False) -> None:
    """Print remarks, table, what does not hold, and the verdicts.

    Args:
        findings: What was found.
        every: A row for each matrix, and no list cut short.
    """
    console = Console(highlight=False)
    console.width = max(console.width, 120 if console.is_terminal else 200)  # rich would cut numbers to a pipe's 80
    for remark in findings.remarks:
        console.print(Text(remark), soft_wrap=True)
    console.print(table(findings, every=every))
    for lines in (_problems(findings), _changes(findings.comparison)):
        for line in _shortened(list(lines), every):
            console.print(Text(line), soft_wrap=True)
    for line in _last_lines(findings):
        console.print(Text(line, "bold"), soft_wrap=True)


def table(findings: Findings, *, every: bool = False) -> Table:
    """The matrices, as a table.

    Args:
        findings: What was found.
        every: A row for each, instead of one for all that differ in a number of their names.
    """
    groups: dict[str, list[Found]] = {}
    for found in findings.matrices:
        groups.setdefault(found.part.name if every else _NUMBER.sub("*", found.part.name), []).append(found)
    changes = {change.name: change for change in findings.comparison.changes} if findings.comparison else None
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("matrix", overflow="fold")
    headers = ["tensors", "shape", "zero", "N:M"]
    headers += [f"groups\nnot {findings.pattern}"] if findings.pattern else []
    headers += ["masked,\nnot zero"] if findings.request.masks else []
    headers += ["pruned\nof dense", "changed\nof dense"] if changes is not None else []
    for header in headers:
        shown.add_column(header, justify="right", no_wrap=True)
    for name, group in groups.items():
        shown.add_row(Text(name), *_cells(findings, group, changes))
    return shown


def _cells(findings: Findings, group: Sequence[Found], changes: dict[str, Change] | None) -> list[str]:
    """A row of the table after the name."""
    shapes = {" x ".join(map(str, found.shape)) for found in group}
    shares = [sparsity([found]) for found in group]
    low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
    common = [one for one in group[0].zeros.patterns if all(one in found.zeros.patterns for found in group)]
    cells = [
        f"{len(group):,}",
        shapes.pop() if len(shapes) == 1 else "various",
        low if low == high else f"{low} to {high}",
    ]
    cells.append(" ".join(map(str, strongest(common))) or "-")
    if findings.pattern:
        over = [found.zeros.over for found in group]
        cells.append("-" if None in over else f"{sum(one or 0 for one in over):,}")
    if findings.request.masks:
        wrong = [found.zeros.masked_nonzero for found in group if found.zeros.masked_nonzero is not None]
        cells.append(f"{sum(wrong):,}" if wrong else "no mask")
    if changes is not None:
        weights = sum(found.zeros.weights for found in group)
        differing = [changes[found.part.name] for found in group if found.part.name in changes]
        cells += [
            f"{sum(change.pruned for change in differing) / max(1, weights):.1%}",
            f"{sum(change.kept for change in differing) / max(1, weights):.1%}",
        ]
    return cells


def _problems(findings: Findings) -> Iterator[str]:
    """Matrices of which something that was asked does not hold, a line each."""
    for found in findings.matrices:
        if wrong := found.zeros.masked_nonzero:
            yield f"{found.part.name}: {wrong:,} of {found.zeros.masked:,} masked weights are not zero"
    for name in findings.lacking:
        yield f"{name}: has a mask, and the folder lacks it"
    yield from findings.misfits
    if pattern := findings.pattern:
        for found in findings.concerned:
            if found.zeros.over is None:
                yield f"{found.part.name}: {pattern.m} does not divide its inputs ({' x '.join(map(str, found.shape))})"
            elif found.zeros.over:
                groups = f"{found.zeros.over:,} of {found.zeros.groups:,} groups of {pattern.m}"
                yield f"{found.part.name}: {groups} hold more than {pattern.n} weights that are not zero"


def _changes(comparison: Comparison | None) -> Iterator[str]:
    """What differs from the dense model, besides what the table has."""
    if comparison is None:
        return
    kept = [change for change in comparison.changes if change.is_matrix and change.kept]
    largest = max((change.largest for change in kept), default=0.0)
    yield (
        f"tensors with the dense model's values: {comparison.same:,}; matrices whose kept weights differ: {len(kept):,}"
        + (f", by {largest:.3g} at most" if kept else "")
    )
    for change in comparison.changes:
        differing = change.pruned + change.kept
        if not change.is_matrix and differing:
            rounding = ", all by rounding" if change.is_rounding else ""
            yield f"{change.name}: {differing:,} of {change.numbers:,} numbers differ{rounding}"
    kinds = {change.dtypes for change in comparison.changes if change.dtypes[0] != change.dtypes[1]}
    for here, dense in sorted(kinds):
        alike = [change for change in comparison.changes if change.dtypes == (here, dense)]
        rounded = sum(change.is_rounding for change in alike)
        yield f"tensors in {here}, dense in {dense}: {len(alike):,}, of which {rounded:,} differ by that alone"
    yield from comparison.mismatched
    yield from (f"{name}: not in the dense model" for name in comparison.only_here)
    yield from (f"{name}: only in the dense model" for name in comparison.only_dense)


def _shortened(lines: list[str], every: bool) -> list[str]:
    if every or len(lines) <= LISTED:
        return lines
    return [*lines[:LISTED], f"... and {len(lines) - LISTED:,} more lines, which --all prints"]


def _last_lines(findings: Findings) -> Iterator[str]:
    """How sparse it is, and the verdicts."""
    patterns = " ".join(map(str, strongest(findings.patterns))) or "none"
    of_masks = " with masks" if findings.request.masks else ""
    yield (
        f"zero: {sparsity(findings.concerned):.1%} of the weights of {len(findings.concerned):,} matrices{of_masks}, "
        f"{findings.total_sparsity:.1%} of all parameters; N:M in each of these matrices: {patterns}"
    )
    if verdicts := findings.verdicts():
        yield "; ".join(f"{verdict.says}: {'yes' if verdict.holds else 'no'}" for verdict in verdicts)


def as_json(findings: Findings) -> str:
    """Everything that was found, as strict JSON: null for what is not finite."""
    request, verdicts = findings.request, findings.verdicts()
    content: dict[str, Any] = {
        "folder": str(request.folder),
        "masks": None if request.masks is None else str(request.masks),
        "dense": None if request.dense is None else str(request.dense),
        "remarks": findings.remarks,
        "holds": all(verdict.holds for verdict in verdicts) if verdicts else None,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "sparsity": {"matrices": sparsity(findings.concerned), "total": findings.total_sparsity},
        "patterns": list(map(str, findings.patterns)),
        "matrices": [_matrix_as_dict(found) for found in findings.matrices],
        "lacking": findings.lacking,
        "misfits": findings.misfits,
        "comparison": None if findings.comparison is None else _comparison_as_dict(findings.comparison),
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _matrix_as_dict(found: Found) -> dict[str, Any]:
    known = asdict(found.zeros) | {"patterns": list(map(str, found.zeros.patterns)), "sparsity": sparsity([found])}
    about = {"name": found.part.name, "shape": list(found.shape), "dtype": found.dtype}
    return about | {"input_dim": found.part.input_dim} | known


def _comparison_as_dict(comparison: Comparison) -> dict[str, Any]:
    content = asdict(comparison)
    for change in content["changes"]:
        change["dtypes"] = dict(zip(("here", "dense"), change["dtypes"], strict=True))
        change["largest"] = change["largest"] if math.isfinite(change["largest"]) else None
    return content
