"""The heat map of sparsity: a cell per kind and layer."""

import numpy as np

from lit_recon.report.heat_map import sparsity_by_layer


def test_every_matrix_has_its_cell_and_experts_share_one() -> None:
    figure = sparsity_by_layer(
        {
            "model.layers.0.self_attn.q_proj.weight": 0.25,
            "model.layers.2.self_attn.q_proj.weight": 0.75,
            "model.layers.0.mlp.experts.0.w1.weight": 0.4,
            "model.layers.0.mlp.experts.1.w1.weight": 0.6,
        }
    )
    assert figure is not None
    axes, bar = figure.axes
    values = axes.images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(values, [[0.25, 0.75], [0.5, np.nan]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["self_attn.q_proj", "mlp.experts.*.w1"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2"] and axes.get_xlabel() == "layer"
    assert bar.get_ylabel() == "sparsity (share of zeros)"
    assert sorted(text.get_text() for text in axes.texts) == ["25%", "50%", "75%"]


def test_names_without_a_layer_are_not_drawn_and_many_layers_have_no_numbers_in_their_cells() -> None:
    assert sparsity_by_layer({"lm_head.weight": 0.5}) is None
    figure = sparsity_by_layer({f"layers.{layer}.{kind}.weight": 0.5 for layer in range(80) for kind in "abcdefg"})
    assert figure is not None and not figure.axes[0].texts and figure.axes[0].images[0].get_array().shape == (7, 80)
