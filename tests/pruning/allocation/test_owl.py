"""OWL gives layers with more outliers a lower sparsity, and keeps the mean over all weights."""

import numpy as np
import pytest
import torch

from lit_recon.pruning.allocation.owl import HIGHEST, OutlierShare, outlier_share, owl_sparsities
from lit_recon.system.finite import NotFinite


def test_outliers_are_counted_against_the_mean_over_all_matrices_of_the_layer() -> None:
    # Mean of the layer: (9 + 2 + 1 + 6) / 10 = 1.8. Above 5 * 1.8 = 9 is none, above 3 * 1.8 = 5.4 are 9 and 6.
    matrices = [torch.tensor([[9.0, 2.0], [1.0, 0.0]]), torch.tensor([[6.0, 0.0, 0.0], [0.0, 0.0, 0.0]])]
    assert outlier_share(matrices, threshold=5.0) == 0.0
    assert outlier_share(matrices, threshold=3.0) == 0.2
    # The second matrix by itself has mean 1, so that its 6 is above 5 times that.
    assert outlier_share(matrices[1:], threshold=5.0) == pytest.approx(1 / 6)


def test_matrices_may_come_one_at_a_time() -> None:
    layer = [torch.rand(8, 16, generator=torch.Generator().manual_seed(seed)) ** 4 for seed in range(3)]
    outliers = OutlierShare(2.0)
    for scores_OI in layer:
        outliers.add(scores_OI)
    for scores_OI in layer:
        outliers.count(scores_OI)
    scores = np.concatenate([scores_OI.numpy().ravel() for scores_OI in layer])
    assert outliers.share == np.mean(scores > 2 * scores.mean()) > 0.1


def test_equal_scores_have_no_outliers_also_where_all_are_zero() -> None:
    assert outlier_share([torch.zeros(2, 3)]) == outlier_share([torch.ones(2, 3)]) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_scores_that_have_no_mean_are_refused(value: float) -> None:
    with pytest.raises(NotFinite, match="no mean"):
        outlier_share([torch.tensor([1.0, value])])


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_no_positive_number_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold=.*such as 5"):
        OutlierShare(threshold)


def test_densities_are_linear_in_the_shares_and_span_twice_the_spread() -> None:
    # Densities before the shift: 0.22, 0.38, 0.30 for shares 0, 4, 2: their mean is 1 - 0.7 already.
    assert owl_sparsities([0.0, 0.04, 0.02], [10, 10, 10], 0.7, 0.08) == pytest.approx([0.78, 0.62, 0.70])
    # Densities 0.22, 0.38, 0.22 with mean 0.82 / 3 are shifted by 0.3 - 0.82 / 3 = 0.08 / 3.
    shift = 0.08 / 3
    assert owl_sparsities([0.01, 0.03, 0.01], [10, 10, 10], 0.7, 0.08) == pytest.approx(
        [0.78 - shift, 0.62 - shift, 0.78 - shift]
    )


def test_layers_of_equal_size_have_the_sparsities_of_the_papers_code() -> None:
    shares = np.random.default_rng(0).random(12)
    scaled = (shares - shares.min()) / (shares.max() - shares.min()) * 2 * 0.08
    density = scaled - scaled.mean() + (1 - 0.6)
    assert owl_sparsities(shares.tolist(), [5] * 12, 0.6, 0.08) == pytest.approx((1 - density).tolist())


def test_larger_layers_count_more_in_the_mean() -> None:
    # Sparsities 0.58 and 0.42; by size (0.58 * 3 + 0.42) / 4 = 0.54, so that both are shifted by -0.04.
    assert owl_sparsities([0.0, 1.0], [300, 100], 0.5, 0.08) == pytest.approx([0.54, 0.38])


def test_equal_shares_and_no_spread_are_uniform() -> None:
    assert owl_sparsities([0.02, 0.02], [3, 5], 0.5) == [0.5, 0.5]
    assert owl_sparsities([0.01, 0.02], [3, 5], 0.5, 0.0) == pytest.approx([0.5, 0.5])


def test_what_is_cut_off_at_an_end_is_made_up_for_by_the_other_layers() -> None:
    # Wanted 0.13, 0.05, -0.03: the last one is 0, and the others share 0.15 - 0.08 apart: 0.115 and 0.035.
    assert owl_sparsities([0.0, 1.0, 2.0], [1, 1, 1], 0.05, 0.08) == pytest.approx([0.115, 0.035, 0.0])
    # Wanted 1.03, 0.95, 0.87: the first one is 0.999, and the others share 2.85 - 0.999 = 1.851, 0.08 apart.
    assert owl_sparsities([0.0, 1.0, 2.0], [1, 1, 1], 0.95, 0.08) == pytest.approx([HIGHEST, 0.9655, 0.8855])


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.3, 0.5, 0.97, 0.999, 0.9999])
@pytest.mark.parametrize("spread", [0.0, 0.08, 0.5, 0.99])
def test_the_mean_over_all_weights_is_the_sparsity_and_the_order_that_of_the_shares(
    sparsity: float, spread: float
) -> None:
    rng = np.random.default_rng(1)
    shares, sizes = rng.random(30), rng.integers(1, 1000, 30)
    found = np.array(owl_sparsities(shares.tolist(), sizes.tolist(), sparsity, spread))
    assert np.average(found, weights=sizes) == pytest.approx(sparsity, abs=1e-12)
    assert found.min() >= 0 and found.max() < 1
    assert (np.diff(found[np.argsort(shares)]) <= 1e-15).all()


@pytest.mark.parametrize("spread", [-0.1, 1.0, float("nan")])
def test_a_spread_outside_the_half_open_interval_is_refused(spread: float) -> None:
    with pytest.raises(ValueError, match=r"spread=.*\[0, 1\)"):
        owl_sparsities([0.0, 1.0], [1, 1], 0.5, spread)
