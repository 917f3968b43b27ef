r"""Rules that give matrices patterns of their own, by regular expressions on their names.

The setting `sparsity` as a list in order. The first rule whose expression is found (re.search) in the qualified name of
a matrix takes it; what no rule takes keeps the base pattern:

    sparsity:
      - {match: 'layers\.0\.', skip: true}    stays dense
      - {match: 'down_proj', sparsity: 0.4}   unstructured, compared as the base pattern does
      - {match: 'mlp', n: 2, m: 4}            keep 2 of every 4
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_recon.pruning.allocation.table import collapse_numbers
from lit_recon.pruning.patterns import NM, Pattern, Unstructured
from lit_recon.system.expressions import check_expression

KEYS = ("match", "sparsity", "n", "m", "skip")
_EXAMPLE = "{match: 'down_proj', sparsity: 0.4}"


@dataclass(frozen=True)
class _Rule:
    """One rule, checked: unstructured at `sparsity`, or N:M."""

    expression: re.Pattern[str]
    sparsity: float | None
    n: int | None
    m: int | None

    def pattern(self, scope: str) -> Pattern:
        """The rule's pattern; unstructured, it compares scores within `scope`."""
        if self.sparsity is not None:
            return Unstructured(sparsity=self.sparsity, scope=scope)
        assert self.n is not None and self.m is not None
        return NM(n=self.n, m=self.m)


class Rules:
    """Patterns by rules on the matrices' names; the first rule that matches wins.

    Args:
        rules: Mappings of `match` (a regular expression) and exactly one of `sparsity` (in [0, 1)), `n` with `m` (keep
            n of every m), `skip: true` (stays dense). A key whose value is None, or `skip: false`, counts as left out.

    Raises:
        ValueError: With all that is wrong with the rules, each as sparsity[i].
    """

    def __init__(self, rules: Sequence[Mapping[str, Any]]) -> None:
        if isinstance(rules, str) or not isinstance(rules, Sequence) or not rules:
            raise ValueError(f"sparsity={rules!r}: expected a list of at least one rule such as {_EXAMPLE}.")
        if problems := [problem for index, rule in enumerate(rules) for problem in _problems(index, rule)]:
            raise ValueError("\n".join(problems))
        self.rules = [
            _Rule(
                expression=re.compile(rule["match"]),
                sparsity=0.0 if rule.get("skip") else rule.get("sparsity"),
                n=rule.get("n"),
                m=rule.get("m"),
            )
            for rule in rules
        ]

    def describe(self) -> str:
        """In words, for a run's recipe."""
        said = (f"{one.expression.pattern}: {one.pattern('row').describe()}" for one in self.rules)
        return "by rules (" + "; ".join(said) + ")"

    def resolve(self, names: Iterable[str], base: Pattern | None, *, scope: str = "row") -> dict[str, Pattern]:
        """The pattern of each matrix, in the order of the names.

        Args:
            names: Qualified names of all matrices, such as model.layers.3.mlp.up_proj.weight.
            base: The pattern of matrices that no rule matches; None if there is no such pattern.
            scope: Of what an unstructured rule compares the scores.

        Raises:
            ValueError: With all rules that match no name or names that earlier rules took only, and all names without
                a pattern.
        """
        names = list(names)
        taken: dict[str, int] = {}
        unused, problems = [], []
        for index, rule in enumerate(self.rules):
            matched = [name for name in names if rule.expression.search(name)]
            left = [name for name in matched if name not in taken]
            if not matched:
                unused.append(self._setting(index))
            elif not left:
                earlier = ", ".join(f"sparsity[{first}]" for first in sorted({taken[name] for name in matched}))
                problems.append(
                    f"{self._setting(index)} is shadowed by {earlier}: the first rule that matches wins, and all of "
                    f"{_listed(matched)} are taken; place sparsity[{index}] first, or remove it."
                )
            taken |= dict.fromkeys(left, index)
        if unused:
            problems.append(f"{', '.join(unused)}: expected to match some of these matrices: {_listed(names)}.")
        rest = [name for name in names if name not in taken]
        if base is None and rest:
            problems.append(
                f"sparsity: no rule matches {_listed(rest)}; add {{match: '.*', sparsity: 0.5}} as the last rule, or "
                "{match: '.*', skip: true} to leave them dense."
            )
        if problems:
            raise ValueError("\n".join(problems))
        patterns = [rule.pattern(scope) for rule in self.rules]
        resolved = {name: patterns[taken[name]] if name in taken else base for name in names}
        return {name: pattern for name, pattern in resolved.items() if pattern is not None}

    def _setting(self, index: int) -> str:
        return f"sparsity[{index}].match={self.rules[index].expression.pattern!r}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(collapse_numbers(names))


def _problems(index: int, rule: object) -> list[str]:
    """What is wrong with the shape of one rule."""
    here = f"sparsity[{index}]"
    if not isinstance(rule, Mapping):
        return [f"{here}={rule!r}: expected a mapping such as {_EXAMPLE}."]
    given = {key: value for key, value in rule.items() if value is not None and not (key == "skip" and value is False)}
    problems = [
        f"{here}.{key}={given[key]!r}: expected the keys {', '.join(KEYS)}." for key in given if key not in KEYS
    ]
    problems += _match_problems(here, given.get("match"))
    if sum(bool(keys & given.keys()) for keys in ({"sparsity"}, {"n", "m"}, {"skip"})) != 1:
        problems.append(f"{here}={dict(rule)!r}: expected exactly one of sparsity, n with m, skip: true.")
    sparsity, n, m = (given.get(key) for key in ("sparsity", "n", "m"))
    if "sparsity" in given and not _is_share(sparsity):
        problems.append(f"{here}.sparsity={sparsity!r}: expected a share of removed weights in [0, 1), such as 0.5.")
    if ("n" in given or "m" in given) and not _is_n_of_m(n, m):
        problems.append(f"{here}.n={n!r} {here}.m={m!r}: expected both, whole, 0 < n <= m (keep n of every m weights).")
    if "skip" in given and given["skip"] is not True:
        problems.append(f"{here}.skip={given['skip']!r}: expected true, or nothing.")
    return problems


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _is_n_of_m(n: object, m: object) -> bool:
    return type(n) is int and type(m) is int and 0 < n <= m  # True is an int by isinstance


def _match_problems(here: str, match: object) -> list[str]:
    try:
        check_expression(f"{here}.match", match, "names such as model.layers.3.mlp.up_proj.weight")
    except ValueError as error:
        return [str(error)]
    return []
