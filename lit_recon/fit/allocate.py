"""Patterns of all matrices of a model: the same for all, by rules on their names, or shared out by an allocation.

And the windows that are skipped. Rules need the names alone. An allocation, one threshold for a layer or the whole
model, and a choice of windows first look at the dense model (pruning/survey.py); what they decide is kept with the run,
which is resumed with it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lit_recon.activations.block_influence import block_influence, most_alike
from lit_recon.activations.chain import Chain
from lit_recon.fit.job import Method
from lit_recon.model.matrices import LayerMatrices, Matrix
from lit_recon.model.partition import layer_windows
from lit_recon.model.windows import AnyWindow, Window
from lit_recon.pruning.allocation.global_threshold import SharedThreshold
from lit_recon.pruning.allocation.table import table
from lit_recon.pruning.criteria.given import GivenMasks
from lit_recon.pruning.patterns import NM, Pattern, Unstructured
from lit_recon.pruning.survey import Allocation, Survey

log = logging.getLogger(__name__)

Patterns = dict[str, Sequence[Pattern]]  # of each matrix, or of each of its experts, by the matrix's name


def allocation_of(method: Method) -> Allocation | None:
    """What shares the sparsity out after a look at the dense model; None where nothing does."""
    pattern = method.pruning.pattern
    if isinstance(pattern, Unstructured) and pattern.scope in ("layer", "model"):
        return SharedThreshold()
    return method.pruning.allocation


def by_rules(method: Method, matrices: Sequence[Matrix]) -> Patterns:
    """Patterns of matrices by the rules of a method; none where it has no rules.

    Raises:
        ValueError: A rule matches no matrix, or a matrix has no rule.
    """
    if method.pruning.rules is None:
        return {}
    names = [matrix.name for matrix in matrices if matrix.input_dim is not None]
    base = None if method.pruning.is_covered else method.pruning.pattern
    scope = method.pruning.pattern.scope if isinstance(method.pruning.pattern, Unstructured) else "row"
    return {name: [pattern] for name, pattern in method.pruning.rules.resolve(names, base, scope=scope).items()}


@dataclass(frozen=True)
class Allocated:
    """What looks at the dense model decide before a walk, and a run is resumed with.

    Attributes:
        patterns: Of its matrices, where they are not the method's pattern.
        skipped: Names of windows that are pruned only, since their dense inputs and outputs are most alike.
    """

    patterns: Patterns
    skipped: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """It as it is kept with a run."""
        stored = {name: [asdict(one) for one in of_experts] for name, of_experts in self.patterns.items()}  # type: ignore[call-overload]
        return {"patterns": stored, "skipped": list(self.skipped)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Allocated":
        """The inverse of `as_json`."""
        patterns: Patterns = {
            name: [_pattern(one) for one in of_experts] for name, of_experts in stored["patterns"].items()
        }
        return cls(patterns, stored["skipped"])


def allocate(
    method: Method, chain: Chain, matrices: LayerMatrices, windows: Sequence[AnyWindow], *, seed: int
) -> Allocated:
    """Patterns of all matrices of a loaded model, and the windows that are skipped.

    Args:
        method: What will be done.
        chain: At the first layer.
        matrices: The model's matrices by layer.
        windows: Its windows.
        seed: Of what statistics and scores draw.

    Raises:
        ValueError: A rule does not fit, or the sparsity cannot be reached.
        NotFinite: A hidden state, a score or an error is not finite.
    """
    return Allocated(_patterns(method, chain, matrices, seed), _skipped(method, chain, windows))


def _patterns(method: Method, chain: Chain, matrices: LayerMatrices, seed: int) -> Patterns:
    """Patterns of all matrices, where they are not the method's pattern."""
    allocation = allocation_of(method)
    if isinstance(method.pruning.criterion, GivenMasks) or allocation is None:
        return by_rules(method, [matrix for layer in matrices for matrix in layer])
    model = chain.passes.decoder.model
    boundary = chain.dense or chain.sparse
    assert boundary is not None
    log.info("looking at all layers for %s", allocation.describe())
    with chain.clock.phase("teacher"):
        survey = Survey(layer_windows(model, matrices), chain.passes, boundary.states_STD, seed)
        return {**allocation.allocate(survey, method.pruning.criterion, method.pruning.pattern)}


def _skipped(method: Method, chain: Chain, windows: Sequence[AnyWindow]) -> list[str]:
    """Names of the windows that are pruned only since their dense inputs and outputs are most alike."""
    share, boundary = method.windows.skip, chain.dense or chain.sparse
    if not share:
        return []
    assert boundary is not None
    whole = [window for window in windows if isinstance(window, Window)]
    with chain.clock.phase("teacher"):
        influences = block_influence(whole, chain.passes, boundary.states_STD)
    names = [whole[index].name for index in most_alike(influences, share)]
    if names:
        log.info("windows.skip=%g leaves out %s", share, ", ".join(names))
    else:
        log.warning("windows.skip=%g leaves out none: it is less than one of %d windows", share, len(whole))
    return names


def target_sparsity(method: Method, patterns: Patterns, matrices: LayerMatrices) -> dict[str, float]:
    """The share of weights that is to be removed of each matrix, by name."""
    names = [matrix.name for layer in matrices for matrix in layer if matrix.input_dim is not None]
    if isinstance(method.pruning.criterion, GivenMasks):
        return {name: method.pruning.criterion.shares[name] for name in names}
    found = {name: patterns.get(name, [method.pruning.pattern]) for name in names}
    return {name: sum(one.sparsity for one in of_experts) / len(of_experts) for name, of_experts in found.items()}


def describe_patterns(patterns: Patterns) -> list[str]:
    """Rows of a table for people: matrices, the share that is removed of them, and their pattern."""
    of_one = {name: of_experts[0] for name, of_experts in patterns.items()}
    rows = table(of_one)
    width = max((len(row.what) for row in rows), default=0)
    return [f"{row.what:{width}}  {row.share:>6}  {row.pattern}" for row in rows]


def _pattern(stored: Mapping[str, Any]) -> Pattern:
    return NM(**stored) if "n" in stored else Unstructured(**stored)
