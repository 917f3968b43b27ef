"""Tables of patterns and lists of names say what there is, with what differs by a number put together."""

import pytest

from lit_recon.pruning.allocation.table import Row, collapse_numbers, sparsity_by_matrix, table
from lit_recon.pruning.patterns import NM, Pattern, Unstructured

PATHS = ("self_attn.q_proj", "mlp.up_proj")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["lm_head.weight"], ["lm_head.weight"]),
        (["a.3.up.weight"], ["a.3.up.weight"]),
        ([f"a.{i}.up.weight" for i in range(30)], ["a.{0..29}.up.weight"]),
        ([f"a.{i}.up" for i in (0, 1, 2, 5, 10, 11)], ["a.{0..2,5,10..11}.up"]),
        ([f"a.{i}.{path}" for i in range(3) for path in ("up", "down")], ["a.{0..2}.up", "a.{0..2}.down"]),
        ([f"a.{i}.experts.{j}.up" for i in range(3) for j in range(8)], ["a.{0..2}.experts.{0..7}.up"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], ["a.0.b.{0..1}", "a.1.b.0"]),
    ],
)
def test_names_that_differ_by_numbers_are_put_together(names: list[str], expected: list[str]) -> None:
    assert collapse_numbers(names) == expected


def test_a_model_with_one_pattern_is_one_row() -> None:
    patterns = {f"model.layers.{layer}.{path}.weight": NM(n=2, m=4) for layer in range(30) for path in PATHS}
    assert table(patterns) == [Row("layers 0-29 all matrices", "50.0%", "2:4 (keep 2 of every 4)")]


def test_matrices_of_the_same_kind_and_pattern_are_one_row_with_their_layers() -> None:
    half, dense = Unstructured(sparsity=0.5), Unstructured(sparsity=0)
    by_path = {"self_attn.q_proj": NM(n=1, m=4), "mlp.up_proj": half}
    patterns = {
        f"model.layers.{layer}.{path}.weight": dense if layer in (0, 4) else by_path[path]
        for layer in range(6)
        for path in PATHS
    }
    assert table(patterns) == [
        Row("layers 0, 4 all matrices", "0.0%", "unstructured 0% per row"),
        Row("layers 1-3, 5 self_attn.q_proj", "75.0%", "1:4 (keep 1 of every 4)"),
        Row("layers 1-3, 5 mlp.up_proj", "50.0%", "unstructured 50% per row"),
    ]


def test_a_sparsity_of_its_own_per_layer_is_a_row_per_layer() -> None:
    patterns: dict[str, Pattern] = {
        f"model.layers.{layer}.{path}.weight": Unstructured(sparsity=sparsity)
        for layer, sparsity in enumerate([0.42, 0.5, 0.58])
        for path in PATHS
    }
    assert [row[:2] for row in table(patterns)] == [
        ("layer 0 all matrices", "42.0%"),
        ("layer 1 all matrices", "50.0%"),
        ("layer 2 all matrices", "58.0%"),
    ]


def test_experts_and_matrices_outside_layers_have_their_rows() -> None:
    half = Unstructured(sparsity=0.5)
    patterns: dict[str, Pattern] = {
        f"model.layers.{layer}.experts.{expert}.up.weight": half for layer in range(2) for expert in range(4)
    }
    patterns |= {f"model.layers.{layer}.q.weight": NM(n=2, m=4) for layer in range(2)}
    patterns["lm_head.weight"] = half
    assert [row.what for row in table(patterns)] == [
        "lm_head.weight",
        "layers 0-1 experts.{0..3}.up",
        "layers 0-1 q",
    ]


def test_for_json_each_matrix_has_its_sparsity() -> None:
    assert sparsity_by_matrix({"a": NM(n=1, m=4), "b": Unstructured(sparsity=0.3)}) == {"a": 0.75, "b": 0.3}


def test_the_only_matrix_of_a_layer_is_named() -> None:
    patterns = {f"model.layers.{layer}.mlp.up_proj.weight": NM(n=2, m=4) for layer in (3, 4)}
    assert table(patterns) == [Row("layers 3-4 mlp.up_proj", "50.0%", "2:4 (keep 2 of every 4)")]
