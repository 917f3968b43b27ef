"""What holds of every refinement."""

import inspect

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lit_recon.pruning.refine import Refinement
from lit_recon.pruning.refine.dsnot import DSnoT
from lit_recon.pruning.refine.swaps import Swaps
from lit_recon.settings.conf import CONF


@pytest.mark.parametrize("refinement", [Swaps, DSnoT])
def test_a_refinement_has_the_protocols_methods_and_the_defaults_of_its_file(refinement: type) -> None:
    made = instantiate(OmegaConf.load(CONF / "refine" / f"{refinement.__name__.lower()}.yaml"))
    assert type(made) is refinement and isinstance(made, Refinement)
    for name, setting in inspect.signature(refinement).parameters.items():
        assert getattr(made, name) == setting.default


def test_who_needs_the_gram_matrix_has_no_statistics() -> None:
    weight_OI = torch.ones(2, 3)
    assert Swaps.needs_gram and Swaps().start(weight_OI) is None
    assert not getattr(DSnoT, "needs_gram", False) and DSnoT().start(weight_OI) is not None
