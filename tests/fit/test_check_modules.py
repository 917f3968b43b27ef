"""Modules that would train nothing, train twice, or are larger than what they change: refused with the reason."""

from functools import partial

import pytest
from conftest import model_of, trainer

from lit_recon.activations.propagation import Propagation
from lit_recon.fit.checks import check_module, check_settings
from lit_recon.model.partition import Partition
from lit_recon.modules.least_squares import LeastSquares
from lit_recon.modules.mask_lora import MaskLora
from lit_recon.modules.masked_weights import MaskedWeights
from lit_recon.modules.norms_biases import NormsBiases
from lit_recon.modules.untrained import Untrained
from lit_recon.reconstruction.fit_settings import FitSettings
from lit_recon.system.command_line import Problems


@pytest.mark.parametrize(
    ("module", "by", "start", "told"),
    [
        (partial(NormsBiases), "matrix", "none", "a single matrix has neither norms nor biases"),
        (partial(LeastSquares), "matrix", "least_squares", "both solve for each matrix"),
    ],
)
def test_modules_that_do_not_fit_other_settings_are_refused(module: partial, by: str, start: str, told: str) -> None:
    problems = Problems()
    check_settings(
        problems,
        windows=Partition(by=by),
        module=module,
        propagation=Propagation(),
        store=None,
        prune_by="window",
        fitting=FitSettings(start=start),
        trainer=trainer().keywords,
    )
    (problem,) = problems.found
    assert told in problem


def test_a_rank_above_that_of_a_matrix_is_refused_with_its_name() -> None:
    check_module(partial(MaskLora, rank=16), model_of("llama"), single=False)
    with pytest.raises(ValueError, match=r"module\.rank=17: model\.layers\.0\.self_attn\.k_proj\.weight has 16 x 32"):
        check_module(partial(MaskLora, rank=17), model_of("llama"), single=False)


def test_a_module_that_trains_nothing_of_a_model_is_refused_unless_that_is_asked_for() -> None:
    check_module(Untrained, model_of("llama"), single=False)
    check_module(partial(NormsBiases, train_norms=False), model_of("gpt2"), single=False)
    for module in (
        partial(NormsBiases, train_norms=False),
        partial(NormsBiases, train_norms=False, train_biases=False),
    ):
        with pytest.raises(ValueError, match="the layers of LlamaForCausalLM have nothing that it trains"):
            check_module(module, model_of("llama"), single=False)
    check_module(MaskedWeights, model_of("llama"), single=False)


def test_a_start_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="start=other: expected one of none, least_squares"):
        FitSettings(start="other")


def test_an_expression_that_chooses_nothing_to_train_is_refused_with_the_names() -> None:
    check_module(partial(MaskedWeights, train="k_proj"), model_of("llama"), single=False)
    with pytest.raises(ValueError, match=r"module\.train=conv is in none of the names self_attn\.q_proj\.weight, "):
        check_module(partial(MaskedWeights, train="conv"), model_of("llama"), single=False)
    with pytest.raises(ValueError, match=r"with windows=matrix: .* by windows\.match=k_proj"):
        check_module(partial(MaskedWeights, train="k_proj"), model_of("llama"), single=True)


def test_choosing_windows_has_no_meaning_where_none_is_reconstructed() -> None:
    problems = Problems()
    check_settings(
        problems,
        windows=Partition(by="block", match="_00"),
        module=partial(MaskedWeights, loss=None),
        propagation=Propagation(),
        store=None,
        prune_by="window",
        fitting=FitSettings(),
        trainer=trainer().keywords,
        walk="global",
    )
    assert any("walk=global with windows.match=_00: windows are pruned only" in problem for problem in problems.found)
