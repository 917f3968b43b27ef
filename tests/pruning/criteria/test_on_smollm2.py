"""Masks of every criterion on a layer of SmolLM2 against references that sort in float64: pytest -m smollm2."""

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from lit_recon import PythonDocs, load
from lit_recon.pruning.criteria import Criterion
from lit_recon.pruning.criteria.magnitude import Magnitude
from lit_recon.pruning.criteria.ria import RIA
from lit_recon.pruning.criteria.sparsegpt import SparseGPT
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import NM, Choice, Pattern, Unstructured

pytestmark = [
    pytest.mark.slow,
    pytest.mark.smollm2,
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.20"), reason="this transformers is refused for the GGUF file"
    ),
]
LAYER = 15
Matrices = dict[str, tuple[Tensor, Tensor]]  # weight (O, I) and inputs (N, I)


@pytest.fixture(scope="module")
def matrices() -> Iterator[Matrices]:
    """Weights of one layer, and what reaches them of 1024 tokens."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.delenv("LIT_RECON_CACHE", raising=False)  # the user's own cache, where the model is
        model, tokenizer = load("smollm2", dtype="float32")
        tokens_ST = PythonDocs(num_samples=4, length=256).samples(tokenizer, seed=0).calibration_ST
    layer = model.model.layers[LAYER]
    found: Matrices = {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args, name=name: found.update({name: (module.weight.detach(), args[0].flatten(0, -2))})
            )
    with torch.no_grad():
        model.model(tokens_ST, use_cache=False)
    assert len(found) == 7
    yield found


def statistics_of(criterion: Criterion, weight_OI: Tensor, inputs_NI: Tensor) -> Tensor | None:
    if getattr(criterion, "needs_gram", False):
        return inputs_NI.T @ inputs_NI
    statistics = criterion.start(weight_OI)
    return None if statistics is None else criterion.update(statistics, inputs_NI)


def keep_half(scores_OI: Tensor, width: int) -> Tensor:
    """The higher half of every `width` scores of a row; of equal ones, of which there are many, the last."""
    ranks = scores_OI.reshape(len(scores_OI), -1, width).argsort(dim=2, stable=True).argsort(dim=2)
    return (ranks >= width // 2).view(scores_OI.shape)


REFERENCES: dict[str, tuple[Criterion, Callable[[Tensor, Tensor], Tensor]]] = {
    "magnitude": (Magnitude(), lambda weight_OI, _: weight_OI.abs()),
    "wanda": (Wanda(), lambda weight_OI, inputs_NI: weight_OI.abs() * inputs_NI.norm(dim=0)),
    "ria": (
        RIA(),
        lambda weight_OI, inputs_NI: (
            (weight_OI.abs() / weight_OI.abs().sum(0) + weight_OI.abs() / weight_OI.abs().sum(1)[:, None])
            * inputs_NI.norm(dim=0).sqrt()
        ),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("pattern", [Unstructured(sparsity=0.5), NM(n=2, m=4)], ids=str)
def test_masks_by_scores_are_those_of_the_reference(name: str, pattern: Pattern, matrices: Matrices) -> None:
    criterion, scores = REFERENCES[name]
    for matrix, (weight_OI, inputs_NI) in matrices.items():
        found_OI = pattern(criterion.scores(weight_OI, statistics_of(criterion, weight_OI, inputs_NI)))
        width = pattern.m if isinstance(pattern, NM) else weight_OI.shape[1]
        expected_OI = keep_half(scores(weight_OI.double(), inputs_NI.double()), width)
        assert (found_OI == expected_OI).double().mean() >= 0.999, matrix


def sparsegpt_reference(weight_OI: Tensor, inputs_NI: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper, in float64: the mask of `width` columns at once, each column then updates the rest."""
    weight_OI, hessian_II = weight_OI.double().clone(), inputs_NI.double().T @ inputs_NI.double()
    hessian_II.diagonal().add_(0.01 * hessian_II.diagonal().mean())
    upper_II = torch.linalg.cholesky(torch.linalg.inv(hessian_II), upper=True)
    mask_OI = torch.empty(weight_OI.shape, dtype=torch.bool)
    for column in range(len(upper_II)):
        if column % width == 0:
            block = slice(column, min(column + width, len(upper_II)))
            scores_OC = weight_OI[:, block] ** 2 / upper_II.diagonal()[block] ** 2
            mask_OI[:, block] = keep_half(scores_OC, scores_OC.shape[1])
        error_O = weight_OI[:, column] * ~mask_OI[:, column] / upper_II[column, column]
        weight_OI[:, column:] -= error_O[:, None] * upper_II[column, column:]
    return mask_OI, weight_OI * mask_OI


@pytest.mark.parametrize(("pattern", "width"), [(Unstructured(sparsity=0.5), 128), (NM(n=2, m=4), 4)], ids=str)
def test_sparsegpt_is_that_of_the_reference_and_leaves_less_than_half_of_the_error_of_wanda(
    pattern: Pattern, width: int, matrices: Matrices
) -> None:
    criterion = SparseGPT()
    for matrix, (weight_OI, inputs_NI) in matrices.items():
        found = criterion.prune(weight_OI, inputs_NI.T @ inputs_NI, Choice(pattern, weight_OI))
        mask_OI, expected_OI = sparsegpt_reference(weight_OI, inputs_NI, width)
        wanda_OI = weight_OI * pattern(weight_OI.abs() * inputs_NI.norm(dim=0))
        error, expected, by_wanda = (
            (inputs_NI.double() @ (pruned_OI.double() - weight_OI).T).square().sum()
            for pruned_OI in (found.weight_OI, expected_OI, wanda_OI)
        )
        assert (found.mask_OI == mask_OI).double().mean() >= 0.99, matrix
        assert abs(error / expected - 1) < 0.01, matrix
        assert error < 0.5 * by_wanda, matrix
