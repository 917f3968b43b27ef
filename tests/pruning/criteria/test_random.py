"""Random scores depend on the seed and the matrix alone."""

import pytest
import torch
from conftest import chain_of

from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import partition
from lit_recon.pruning.criteria.random import Random
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner, prune


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_scores_are_uniform_and_of_the_shape_of_the_weight() -> None:
    scores_OI = Random().scores(normal(200, 300), None)
    assert scores_OI.shape == (200, 300) and scores_OI.dtype == torch.float32
    counts = torch.histc(scores_OI, bins=10, min=0, max=1)
    assert (counts - 6000).abs().max() < 5 * 6000**0.5  # five standard deviations
    for dim in (0, 1):  # no row and no column is favoured
        assert (scores_OI.mean(dim) - 0.5).abs().max() < 0.12


def test_nothing_is_gathered_of_inputs() -> None:
    assert Random().start(torch.ones(2, 3)) is None


def test_scores_do_not_depend_on_what_was_drawn_before_and_draw_from_no_generator_of_others() -> None:
    weight_OI, other_OI = normal(8, 16), normal(8, 16, seed=1)
    criterion = Random(seed=3)
    first_OI = criterion.scores(weight_OI, None)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    criterion.scores(other_OI, None)
    assert torch.equal(criterion.scores(weight_OI, None), first_OI)
    assert torch.equal(Random(seed=3).scores(weight_OI, None), first_OI)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_and_another_matrix_have_other_scores() -> None:
    weight_OI = normal(8, 16)
    changed_OI = weight_OI.clone()
    changed_OI[7, 15] += 1e-6
    found = [Random(0).scores(weight_OI, None), Random(1).scores(weight_OI, None), Random(-1).scores(weight_OI, None)]
    found.append(Random(0).scores(changed_OI, None))
    assert len({tuple(scores_OI.flatten().tolist()) for scores_OI in found}) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_the_same_however_the_weight_is_stored(dtype: torch.dtype) -> None:
    weight_OI = normal(8, 16).to(dtype)
    expected_OI = Random().scores(weight_OI, None)
    assert torch.equal(Random().scores(weight_OI.float(), None), expected_OI)
    assert torch.equal(Random().scores(weight_OI.T.contiguous().T, None), expected_OI)
    assert torch.equal(Random().scores(torch.nn.Parameter(weight_OI), None), expected_OI)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_masks_are_the_same_for_every_kind_of_window_in_any_order_and_batch_size(
    kind: str, tokens_ST: torch.Tensor
) -> None:
    def masks(by: str, *, batch_size: int, backwards: bool = False) -> dict[str, torch.Tensor]:
        model = tiny_model(kind)
        pruner = Pruner(Random(), Unstructured(sparsity=0.5), chain_of(model, tokens_ST, 4, batch_size))
        found: dict[str, torch.Tensor] = {}
        windows = partition(model, by=by)
        for window in reversed(windows) if backwards else windows:
            pruner.begin(window)
            found |= pruner.decide(window, pruner.statistics(window)).masks
            prune(window, found)
        return found

    expected = masks("block", batch_size=2)
    assert all((~mask).sum() == mask.numel() // 2 for mask in expected.values())
    for by in ("half", "matrix", "block"):
        found = masks(by, batch_size=4, backwards=True)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), by


@pytest.mark.parametrize("seed", [1.5, "0", None, True])
def test_a_seed_that_is_no_whole_number_is_refused(seed: object) -> None:
    with pytest.raises(ValueError, match="criterion.seed"):
        Random(seed)  # type: ignore[arg-type]
