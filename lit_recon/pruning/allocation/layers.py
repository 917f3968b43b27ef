"""Patterns of matrices where an allocation chooses a sparsity for each layer."""

from collections.abc import Sequence
from dataclasses import replace

from lit_recon.pruning.patterns import Pattern, Unstructured


def check_unstructured(setting: str, pattern: Pattern) -> None:
    """Raise a ValueError for a pattern whose sparsity is no number that can be chosen for each layer."""
    if not isinstance(pattern, Unstructured) or pattern.scope not in ("row", "matrix"):
        raise ValueError(
            f"{setting} with pattern {pattern.describe()}: the sparsity of each layer is chosen, so expected "
            "pattern=unstructured with pattern.scope=row or matrix."
        )


def by_layer(names: Sequence[Sequence[str]], sparsities: Sequence[float], pattern: Pattern) -> dict[str, list[Pattern]]:
    """The pattern of each matrix where all of a layer have its sparsity.

    Args:
        names: Of the matrices, by layer.
        sparsities: Of the layers.
        pattern: Unstructured; of another sparsity.
    """
    assert isinstance(pattern, Unstructured)
    patterns = [replace(pattern, sparsity=sparsity) for sparsity in sparsities]
    return {name: [one] for one, group in zip(patterns, names, strict=True) for name in group}
