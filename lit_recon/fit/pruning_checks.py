"""Rules between the settings of pruning: criterion, pattern, refinement, rules, allocation; and the matrices for them.

Asked as those of checks.py are: with settings alone, with shapes, and again with weights.
"""

from collections.abc import Mapping, Sequence

from lit_recon.activations.propagation import Propagation
from lit_recon.fit.job import callable_name
from lit_recon.model.matrices import Matrix
from lit_recon.model.partition import Partition
from lit_recon.model.windows import WindowKind
from lit_recon.pruning.allocation.rules import Rules
from lit_recon.pruning.criteria import Criterion, needs_columns, permutes
from lit_recon.pruning.criteria.given import GivenMasks
from lit_recon.pruning.patterns import NM, ColumnPattern, Pattern, Unstructured
from lit_recon.pruning.refine import Refinement
from lit_recon.pruning.survey import Allocation
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.system.command_line import Problems


def check_pruning(
    problems: Problems,
    *,
    criterion: Criterion | None,
    pattern: Pattern | None,
    refinement: Refinement | None,
    rules: Rules | None,
    allocation: Allocation | None,
    propagation: Propagation | None,
    windows: Partition | None = None,
    fitting: FitSettings | None = None,
) -> None:
    """Add what is wrong with how a model is pruned; None for a part that could not be made, or is not there."""
    scope = pattern.scope if isinstance(pattern, Unstructured) else ""
    is_shared = scope in ("layer", "model")
    if isinstance(criterion, GivenMasks):
        for what, part in (("a list of rules in sparsity", rules), ("allocation", allocation)):
            if part is not None:
                problems.add(f"{what} with given masks (criterion=zeros, file): how much goes is given; leave it out.")
        return
    if allocation is not None and rules is not None:
        problems.add("allocation with a list of rules in sparsity: both say where how much goes; leave one out.")
    elif allocation is not None and pattern is not None:
        problems.check(allocation.check, pattern)
    if is_shared and rules is not None:
        problems.add(f"pattern.scope={scope} with a list of rules in sparsity: use pattern.scope=row or matrix.")
    if is_shared and propagation is not None and propagation.statistics == "sparse":
        problems.add(
            f"pattern.scope={scope} with chain.statistics=sparse: one threshold is found before the walk, where all is "
            "dense; use chain.statistics=dense, or pattern.scope=row or matrix."
        )
    if permutes(criterion):
        problems.check(_check_permuted, pattern, refinement, rules, windows, fitting)
    if needs_columns(criterion) and pattern is not None and not isinstance(pattern, ColumnPattern):
        problems.add(
            f"{callable_name(criterion)} prunes from left to right, and {callable_name(pattern)} has no `columns` and "
            "`width` (lit_recon.pruning.patterns.ColumnPattern); use pattern=unstructured or n_m."
        )


def _check_permuted(
    pattern: Pattern | None,
    refinement: Refinement | None,
    rules: Rules | None,
    windows: Partition | None,
    fitting: FitSettings | None,
) -> None:
    """Raise a ValueError for what does not go with another order of hidden channels."""
    if pattern is not None and rules is None and not isinstance(pattern, NM):
        raise ValueError(
            "criterion.permute=true: the order of channels makes a difference with N:M patterns alone; use "
            "pattern=n_m, or leave it out."
        )
    misfits = {
        "refine": refinement is not None,
        "windows=matrix": isinstance(windows, Partition) and windows.by == WindowKind.MATRIX,
        "start=least_squares": fitting is not None and fitting.start != "none",
    }
    if others := [name for name, is_there in misfits.items() if is_there]:
        raise ValueError(
            f"criterion.permute=true with {', '.join(others)}: what looks at single dense matrices needs their "
            "channels where they were; leave one of them out."
        )


def check_pattern(matrices: Sequence[Matrix], patterns: Mapping[str, Sequence[Pattern]]) -> None:
    """Raise a ValueError for matrices that their patterns do not fit."""
    misfits: list[str] = []
    for matrix in matrices:
        if matrix.input_dim is not None:
            try:
                for pattern in patterns[matrix.name]:
                    pattern.check(matrix.name, *matrix.by_expert(matrix.weight).shape[1:])
            except ValueError as error:
                misfits.append(str(error))
    more = [f"... and {len(misfits) - 3} more matrices."] if len(misfits) > 3 else []
    if misfits:
        raise ValueError("\n".join(misfits[:3] + more))


def check_scored(matrices: Sequence[Matrix], *, allow_unscored: bool) -> None:
    """Raise a ValueError for matrices that cannot be scored, unless that is allowed."""
    unscored = [matrix for matrix in matrices if matrix.input_dim is None]
    if not unscored or allow_unscored:
        return
    share = sum(m.weight.numel() for m in unscored) / sum(m.weight.numel() for m in matrices)
    names = ", ".join(matrix.name for matrix in unscored[:3]) + (", ..." if len(unscored) > 3 else "")
    raise ValueError(
        f"{len(unscored)} of {len(matrices)} matrices ({share:.1%} of their parameters) cannot be scored: it is not "
        f"known how their inputs reach them ({names}); allow_unscored=true leaves them dense."
    )
