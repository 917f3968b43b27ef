"""Rules give each matrix the pattern of the first rule that matches its name, or say all that is wrong with them."""

import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from lit_recon.pruning.allocation.rules import Rules
from lit_recon.pruning.patterns import NM, Unstructured

NAMES = [f"model.layers.{layer}.{path}.weight" for layer in range(12) for path in ("self_attn.q_proj", "mlp.up_proj")]
BASE = Unstructured(sparsity=0.5, scope="matrix")


def test_the_first_rule_that_matches_wins_and_the_rest_keeps_the_base() -> None:
    rules = Rules(
        [
            {"match": r"layers\.1\.", "skip": True},
            {"match": r"layers\.(1|2)\.mlp", "n": 2, "m": 4},
            {"match": "q_proj", "sparsity": 0.3},
        ]
    )
    patterns = rules.resolve(NAMES[:8], BASE, scope="matrix")
    assert list(patterns.items()) == [
        ("model.layers.0.self_attn.q_proj.weight", Unstructured(sparsity=0.3, scope="matrix")),
        ("model.layers.0.mlp.up_proj.weight", BASE),
        ("model.layers.1.self_attn.q_proj.weight", Unstructured(sparsity=0, scope="matrix")),
        ("model.layers.1.mlp.up_proj.weight", Unstructured(sparsity=0, scope="matrix")),
        ("model.layers.2.self_attn.q_proj.weight", Unstructured(sparsity=0.3, scope="matrix")),
        ("model.layers.2.mlp.up_proj.weight", NM(n=2, m=4)),
        ("model.layers.3.self_attn.q_proj.weight", Unstructured(sparsity=0.3, scope="matrix")),
        ("model.layers.3.mlp.up_proj.weight", BASE),
    ]


@pytest.mark.parametrize("base", [NM(n=2, m=4), None], ids=str)
def test_an_unstructured_rule_compares_per_row_where_the_base_is_not_unstructured(base: NM | None) -> None:
    assert Rules([{"match": ".", "sparsity": 0.3}]).resolve(NAMES[:1], base) == {NAMES[0]: Unstructured(sparsity=0.3)}


def test_rules_of_a_configuration_are_read_with_keys_that_are_null() -> None:
    rules = OmegaConf.create(
        [{"match": "mlp", "sparsity": None, "n": 1, "m": 4}, {"match": ".", "sparsity": 0, "skip": False}]
    )
    assert Rules(rules).resolve(NAMES[:2], None) == {
        NAMES[0]: Unstructured(sparsity=0),
        NAMES[1]: NM(n=1, m=4),
    }


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (0.5, r"sparsity\[0\]=0\.5: expected a mapping"),
        ({"sparsity": 0.5}, r"sparsity\[0\]\.match=None: expected a regular expression"),
        ({"match": 3, "sparsity": 0.5}, r"sparsity\[0\]\.match=3: expected a regular expression"),
        ({"match": "", "sparsity": 0.5}, r"sparsity\[0\]\.match='': expected a regular expression"),
        ({"match": "(mlp", "sparsity": 0.5}, r"sparsity\[0\]\.match='\(mlp': .*unterminated"),
        (
            {"match": "a", "share": 0.5, "skip": True},
            r"sparsity\[0\]\.share=0\.5: expected the keys match, sparsity, n, m, skip",
        ),
        ({"match": "a"}, r"sparsity\[0\]=\{'match': 'a'\}: expected exactly one of"),
        ({"match": "a", "skip": False}, "expected exactly one of"),
        ({"match": "a", "skip": True, "sparsity": 0.5}, r"sparsity\[0\]=.*'sparsity': 0\.5\}: expected exactly one of"),
        ({"match": "a", "sparsity": 0.5, "n": 2, "m": 4}, "expected exactly one of"),
        ({"match": "a", "sparsity": 1.0}, r"sparsity\[0\]\.sparsity=1\.0: expected .* \[0, 1\)"),
        ({"match": "a", "sparsity": -0.1}, r"\[0, 1\)"),
        ({"match": "a", "sparsity": float("nan")}, r"\[0, 1\)"),
        ({"match": "a", "sparsity": True}, r"sparsity\[0\]\.sparsity=True: expected .* \[0, 1\)"),
        ({"match": "a", "sparsity": "0.5"}, r"sparsity\[0\]\.sparsity='0\.5': expected .* \[0, 1\)"),
        ({"match": "a", "n": 2}, r"sparsity\[0\]\.n=2 sparsity\[0\]\.m=None: expected both"),
        ({"match": "a", "m": 4}, r"n=None .*m=4: expected both"),
        ({"match": "a", "n": 5, "m": 4}, r"n=5 .*m=4: expected both, whole, 0 < n <= m"),
        ({"match": "a", "n": 0, "m": 4}, "0 < n <= m"),
        ({"match": "a", "n": 2.0, "m": 4}, "0 < n <= m"),
        ({"match": "a", "skip": 1}, r"sparsity\[0\]\.skip=1: expected true"),
    ],
)
def test_a_rule_of_the_wrong_shape_is_refused(rule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rules([rule])


@pytest.mark.parametrize("rules", [[], "0.5", 0.5, {"match": "a", "skip": True}], ids=str)
def test_anything_but_a_list_of_rules_is_refused(rules: Any) -> None:
    with pytest.raises(ValueError, match="expected a list of at least one rule"):
        Rules(rules)


def test_all_that_is_wrong_with_the_rules_is_said_at_once() -> None:
    with pytest.raises(ValueError) as raised:
        Rules([{"match": "a", "sparsity": 2}, {"match": "b", "skip": True}, {"match": "(", "n": 3, "m": 2}])
    assert [line.split("=")[0] for line in str(raised.value).splitlines()] == [
        "sparsity[0].sparsity",
        "sparsity[2].match",
        "sparsity[2].n",
    ]


def test_rules_that_match_no_matrix_are_refused_with_the_names_in_short() -> None:
    rules = Rules(
        [{"match": "up_proj", "skip": True}, {"match": "gate", "sparsity": 0.3}, {"match": "Q_PROJ", "skip": True}]
    )
    with pytest.raises(ValueError) as raised:
        rules.resolve(NAMES, BASE)
    assert str(raised.value) == (
        "sparsity[1].match='gate', sparsity[2].match='Q_PROJ': expected to match some of these matrices: "
        "model.layers.{0..11}.self_attn.q_proj.weight, model.layers.{0..11}.mlp.up_proj.weight."
    )


def test_a_rule_whose_matrices_earlier_rules_took_is_refused_with_those_rules() -> None:
    rules = Rules(
        [
            {"match": "q_proj", "skip": True},
            {"match": r"layers\.11\.", "skip": True},
            {"match": r"layers\.(2|11)\.mlp", "sparsity": 0.1},  # takes that of layer 2
            {"match": r"layers\.(2|11)\.", "sparsity": 0.3},
        ]
    )
    with pytest.raises(
        ValueError,
        match=re.escape("match='layers\\\\.(2|11)\\\\.' is shadowed by sparsity[0], sparsity[1], sparsity[2]"),
    ):
        rules.resolve(NAMES, BASE)


def test_a_rule_is_not_shadowed_while_one_matrix_is_left_to_it() -> None:
    rules = Rules([{"match": r"layers\.[0-8]\.", "skip": True}, {"match": r"layers\.(8|9)\.mlp", "sparsity": 0.3}])
    patterns = rules.resolve(NAMES, BASE)
    assert [name for name, pattern in patterns.items() if pattern.sparsity == 0.3] == [
        "model.layers.9.mlp.up_proj.weight"
    ]


def test_without_a_base_matrices_that_no_rule_matches_are_refused_by_name_with_the_remedy() -> None:
    with pytest.raises(ValueError) as raised:
        Rules([{"match": "q_proj", "sparsity": 0.3}]).resolve(NAMES, None)
    assert "no rule matches model.layers.{0..11}.mlp.up_proj.weight; add {match: '.*', sparsity: 0.5}" in str(
        raised.value
    )
    assert "{match: '.*', skip: true}" in str(raised.value)


def test_all_that_is_wrong_with_the_matches_is_said_at_once() -> None:
    rules = Rules([{"match": "q_proj", "skip": True}, {"match": "q_", "skip": True}, {"match": "gate", "skip": True}])
    with pytest.raises(ValueError) as raised:
        rules.resolve(NAMES, None)
    said = str(raised.value).splitlines()
    assert len(said) == 3
    assert "sparsity[1].match='q_' is shadowed by sparsity[0]" in said[0]
    assert said[1].startswith("sparsity[2].match='gate'")
    assert said[2].startswith("sparsity: no rule matches model.layers.{0..11}.mlp.up_proj.weight")
