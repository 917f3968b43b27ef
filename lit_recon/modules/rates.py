"""Learning rates relative to the weights: a step of AdamW changes each weight by about a share of what is usual.

Rates do not carry over between models: 2e-3 is 1% of the root mean square of SmolLM2's weights, and 5 to 12% of that
of Gemma 3 270M's. With `lr=probe` the rate is a share of the median over a window's matrices of their root mean square,
and which share is found by trying (reconstruction/rate_search.py). One rate for all of a window: where each parameter
had a share of its own size, Gemma 3 270M won back 28% of what pruning cost instead of 35%, in nats.
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
REFERENCE = 0.01  # of that median: the rate that a probe starts from


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
        make: Makes it from parameters or their groups; with `lr=probe` each has a rate by their sizes.
        parameters: What is trained.
        sizes: By what the rates of some of them are scaled, with `lr=probe`; those of the others, by what is usual.
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
    """REFERENCE times the size of each parameter that has one in `sizes`, and the median of all sizes for the others.

    Sizes of the others are the `root_mean_square` of matrices; of norms and biases where no matrix is trained.
    """
    known = sizes or {}
    found = [(one.dim() > 1, known[one] if one in known else root_mean_square(one)) for one in parameters]
    wide, narrow = ([value for is_wide, value in found if value and is_wide == kind] for kind in (True, False))
    usual = median(wide or narrow or [1.0])
    return [REFERENCE * (known.get(one) or usual) for one in parameters]


@torch.no_grad()
def root_mean_square(weight: Tensor) -> float:
    """Of what is not zero in a parameter; 0 where all is."""
    kept = weight.count_nonzero()
    return (weight.float().square().sum() / kept).sqrt().item() if kept else 0.0
