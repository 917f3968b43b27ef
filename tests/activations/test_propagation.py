"""Choices of inputs, targets and statistics: which are refused, and what each costs."""

import gc
import re
from typing import Any

import pytest
import torch
from conftest import chain_of
from torch import Tensor
from walks import CALIBRATION, CHOICES, LENGTH, SAMPLES, VALID, propagation_of

from lit_recon.activations import propagation as propagation_file
from lit_recon.activations.propagation import Propagation
from lit_recon.model.architectures import tiny_model
from lit_recon.model.partition import layer_windows

TABLE = {  # inputs, targets, statistics: memory, passes; from the README
    ("dense", "dense", "dense"): (2, 1),
    ("dense", "dense", "sparse"): (3, 3),
    ("sparse", "dense", "dense"): (3, 2),
    ("sparse", "dense", "sparse"): (3, 3),
    ("sparse", "local", "dense"): (4, 3),
    ("sparse", "local", "sparse"): (2, 2),
    ("mix", "dense", "dense"): (4, 2),
    ("mix", "dense", "sparse"): (4, 3),
    ("mix", "local", "dense"): (5, 3),
    ("mix", "local", "sparse"): (5, 4),
}


@pytest.fixture
def tokens_ST() -> Tensor:
    """Three calibration and two held-out samples: not a multiple of the batch of two."""
    return torch.randint(3, 64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("propagation", CHOICES, ids=" ".join)
def test_only_local_targets_of_dense_inputs_are_refused_with_the_reason(propagation: tuple[str, str, str]) -> None:
    if propagation in VALID:
        assert (
            propagation_of(*propagation).inputs,
            propagation_of(*propagation).targets,
            propagation_of(*propagation).statistics,
        ) == propagation
        return
    with pytest.raises(ValueError, match=r"chain\.targets=local with chain\.inputs=dense.*Use chain\.targets=dense"):
        propagation_of(*propagation)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"inputs": "sparce"}, r"chain\.inputs='sparce': expected one of dense, sparse, mix"),
        ({"targets": "mix"}, r"chain\.targets='mix': expected one of dense, local"),
        ({"statistics": "local"}, r"chain\.statistics='local': expected one of dense, sparse"),
        ({"inputs": "mix", "mix": 0}, r"chain\.mix=0: .*use chain\.inputs=sparse or dense"),
        ({"inputs": "mix", "mix": 1.0}, r"chain\.mix=1\.0"),
        ({"mix": "half"}, r"chain\.mix=half"),
    ],
    ids=str,
)
def test_an_unknown_choice_is_refused_with_what_is_expected(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Propagation(**settings)


def test_all_problems_of_a_regime_are_told_at_once() -> None:
    with pytest.raises(ValueError) as refusal:
        Propagation(inputs="x", targets="y", statistics="z", mix=2)
    assert [line.partition("=")[0] for line in str(refusal.value).splitlines()] == [
        "chain.inputs",
        "chain.targets",
        "chain.statistics",
        "chain.mix",
    ]


def documented_table() -> dict[tuple[str, ...], tuple[int, int]]:
    """The table in the docstring of propagation.py."""
    rows = re.findall(r"^ +(\w+) +(\w+) +(\w+) +(\d) +(\d) ", propagation_file.__doc__ or "", re.MULTILINE)
    return {row[:3]: (int(row[3]), int(row[4])) for row in rows}


def test_the_documented_table_has_every_valid_regime() -> None:
    assert documented_table() == TABLE
    assert set(TABLE) == set(VALID)


@pytest.mark.parametrize("propagation", VALID, ids=" ".join)
def test_arrays_and_passes_are_those_of_the_table(propagation: tuple[str, str, str]) -> None:
    made = propagation_of(*propagation)
    assert (made.num_arrays, made.passes) == TABLE[propagation]
    assert made.independent == (propagation == ("dense", "dense", "dense"))


@pytest.mark.parametrize("propagation", VALID, ids=" ".join)
def test_a_window_is_run_as_often_as_the_table_says(propagation: tuple[str, str, str], tokens_ST: Tensor) -> None:
    model = tiny_model("llama")
    chain = chain_of(model, tokens_ST, CALIBRATION, propagation=propagation_of(*propagation))
    for window in layer_windows(model):
        samples: list[int] = []
        handle = window.register_forward_pre_hook(lambda _, args, samples=samples: samples.append(len(args[0])))
        chain.dense_pass(window)
        chain.advance(window)
        handle.remove()
        # Sparse statistics alone look at no held-out sample.
        apart = propagation[2] == "sparse" and propagation[:2] != ("sparse", "local")
        assert sum(samples) == TABLE[propagation][1] * SAMPLES - apart * (SAMPLES - CALIBRATION)


@pytest.mark.parametrize("propagation", VALID, ids=" ".join)
def test_as_many_arrays_of_hidden_states_are_there_as_the_table_says(propagation: tuple[str, str, str]) -> None:
    tokens_ST = torch.randint(3, 64, (7, 11), generator=torch.Generator().manual_seed(1))
    model = tiny_model("llama")
    chain = chain_of(model, tokens_ST, 4, propagation=propagation_of(*propagation))
    for window in layer_windows(model):
        chain.dense_pass(window)
        chain.advance(window)
    gc.collect()
    found = {
        tensor.untyped_storage().data_ptr()
        for tensor in gc.get_objects()
        if type(tensor) is Tensor and tuple(tensor.shape) == (7, 11, 32)
    }
    assert len(found) == TABLE[propagation][0]
