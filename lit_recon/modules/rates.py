"""Learning rates relative to the weights: a step of AdamW changes each weight by about the same share of its matrix.

Rates do not carry over between models: 2e-3 is 1% of the root mean square of SmolLM2's weights, and 5 to 12% of that
of Gemma 3 270M's. With `lr=probe` each parameter's rate is a share of its own root mean square, and which share is
found by trying (reconstruction/rate_search.py).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

PROBE: Final = "probe"
REFERENCE = 0.01  # of the root mean square of what is trained: the rate that a probe starts from


def is_probed(make: Callable[..., Any]) -> bool:
    """Whether a module, or its partial call, has an optimizer whose learning rate is to be probed."""
    while isinstance(make, partial):
        if "optimizer" in make.keywords:
            optimizer = make.keywords["optimizer"]
            return getattr(optimizer, "keywords", {}).get("lr") == PROBE
        make = make.func
    return False


def make_optimizer(
    make: Callable[..., Optimizer], parameters: Sequence[Tensor], sizes: Mapping[Tensor, float] | None = None
) -> Optimizer:
    """An optimizer over matrices, with norms and biases in groups of their own, which no weight decay pulls to zero.

    Args:
        make: Makes it from parameters or their groups; with `lr=probe` each parameter has a rate of its own.
        parameters: What is trained.
        sizes: What counts as the root mean square of some of them, with `lr=probe`; of the others, their own.
    """
    matrices, vectors = ([one for one in parameters if (one.dim() > 1) == wide] for wide in (True, False))
    given: dict[str, Any] = getattr(make, "keywords", {})
    undecayed = {"weight_decay": 0.0} if "weight_decay" in signature(make).parameters else {}
    if given.get("lr") != PROBE:
        kinds: list[tuple[list[Tensor], dict[str, float]]] = [(matrices, {}), (vectors, undecayed)]
        return make([{"params": members} | own for members, own in kinds if members])
    assert isinstance(make, partial)
    is_relative = getattr(torch.optim, "Adafactor", None) is make.func  # its own steps are shares of the same
    rates = [REFERENCE] * len(parameters) if is_relative else relative_rates([*matrices, *vectors], sizes)
    settings = {name: value for name, value in given.items() if name != "lr"}
    groups = [
        {"params": [one], "lr": rate} | (undecayed if one.dim() < 2 else {})
        for one, rate in zip([*matrices, *vectors], rates, strict=True)
    ]
    return make.func(groups, *make.args, **settings, lr=REFERENCE)


def relative_rates(parameters: Sequence[Tensor], sizes: Mapping[Tensor, float] | None = None) -> list[float]:
    """REFERENCE times the size of each parameter: its `root_mean_square`; of one that is zero, the median's."""
    known = sizes or {}
    found = [known[one] if one in known else root_mean_square(one) for one in parameters]
    usual = median([value for value in found if value] or [1.0])
    return [REFERENCE * (value or usual) for value in found]


@torch.no_grad()
def root_mean_square(weight: Tensor) -> float:
    """Of what is not zero in a parameter; 0 where all is."""
    kept = weight.count_nonzero()
    return (weight.float().square().sum() / kept).sqrt().item() if kept else 0.0
