"""Table of the patterns that matrices were given, for people; names with their numbers collapsed.

A model has hundreds of matrices that differ by the number of their layer (and of their expert). What reads the same is
one row: "layers 0-29 mlp.up_proj", and in a list of names `model.layers.{0..29}.mlp.up_proj.weight`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lit_recon.pruning.patterns import Pattern

ALL = "all matrices"
_IN_LAYER = re.compile(r"(?:.*?\.)??(\d+)\.(.+?)(?:\.weight)?")  # the first number of a name is its layer's
Reading = tuple[str, str]  # share and pattern, as they read
_NUMBER = "{}"  # stands for the number while names that differ by it are put together


class Row(NamedTuple):
    """Matrices whose sparsity and pattern read the same.

    Attributes:
        what: The matrices: "layers 0-29 mlp.up_proj".
        share: The share of weights that are removed: "50.0%".
        pattern: The pattern in words: "2:4 (keep 2 of every 4)".
    """

    what: str
    share: str
    pattern: str


def table(patterns: Mapping[str, Pattern]) -> list[Row]:
    """Rows of the patterns by matrix, in the order of their first matrix; a layer whose matrices are all alike is one.

    Args:
        patterns: By the matrices' qualified names, in the model's order.
    """
    layers: dict[int, dict[str, Reading]] = {}
    rows = []
    for name, pattern in patterns.items():
        reading = (f"{pattern.sparsity:.1%}", pattern.describe())
        if found := _IN_LAYER.fullmatch(name):
            layers.setdefault(int(found[1]), {})[found[2]] = reading
        else:
            rows.append(Row(name, *reading))
    numbers: dict[tuple[str, Reading], list[int]] = {}  # of the layers
    for layer, readings in layers.items():
        alike = len(readings) > 1 and len(set(readings.values())) == 1
        for path, reading in [(ALL, next(iter(readings.values())))] if alike else readings.items():
            numbers.setdefault((path, reading), []).append(layer)
    paths: dict[tuple[str, Reading], list[str]] = {}  # by layers: experts' paths differ by a number too
    for (path, reading), found_in in numbers.items():
        where = f"{'layers' if len(found_in) > 1 else 'layer'} {_ranges(found_in, '-', ', ')}"
        paths.setdefault((where, reading), []).append(path)
    for (where, reading), alike_paths in paths.items():
        rows += [Row(f"{where} {path}", *reading) for path in collapse_numbers(alike_paths)]
    return rows


def sparsity_by_matrix(patterns: Mapping[str, Pattern]) -> dict[str, float]:
    """The share of weights that are removed by matrix, for JSON."""
    return {name: pattern.sparsity for name, pattern in patterns.items()}


def collapse_numbers(names: Iterable[str]) -> list[str]:
    """Names with the numbers in which they differ put together: "layers.{0..2,5}.up.weight"; order of first names.

    Exact also where numbers do not form a full grid: then several names remain.
    """
    rows = [tuple(name.split(".")) for name in dict.fromkeys(names)]
    for position in reversed(range(max(map(len, rows), default=0))):
        together: dict[tuple[str, ...], list[int]] = {}
        for parts in rows:
            if position < len(parts) and parts[position].isdecimal():
                key = (*parts[:position], _NUMBER, *parts[position + 1 :])
                together.setdefault(key, []).append(int(parts[position]))
            else:
                together[parts] = []
        rows = [
            (*key[:position], _braced(found), *key[position + 1 :]) if found else key for key, found in together.items()
        ]
    return [".".join(parts) for parts in rows]


def _braced(numbers: list[int]) -> str:
    return "{" + _ranges(numbers, "..", ",") + "}" if len(numbers) > 1 else str(numbers[0])


def _ranges(numbers: Iterable[int], to: str, between: str) -> str:
    """Numbers as ranges: "0-3, 5" with `to` "-" and `between` ", "."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return between.join(f"{run[0]}{to}{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
