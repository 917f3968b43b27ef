"""Order of the hidden channels of an MLP, by which an N:M pattern keeps more (RIA: Zhang et al., ICLR 2024).

    down(act(gate(x)) * up(x))

is the same whatever the order of its hidden channels, if the outputs of gate and up and the inputs of down are put into
it together, and costs nothing when the model runs. The order decides which inputs of down share a group of M, of which
N stay. Channels are dealt out to groups by their summed scores, the best ones apart from each other; then the channels
at each place of the groups in turn are exchanged among groups so that most is kept: a linear assignment.

Shapes: O outputs, I inputs (hidden channels), B = I / M groups, C channels that are exchanged.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from lit_recon.model.matrices import Matrix
from lit_recon.model.windows import AnyWindow
from lit_recon.pruning.patterns import NM

TOLERANCE = 1e-4  # of the largest output: what another order of sums in float32 may change


@dataclass(frozen=True)
class HiddenChannels:
    """The hidden channels of an MLP.

    Attributes:
        into: The matrices that output them, each once or, where several are fused in one (gate and up), several times.
        out: The matrix whose inputs they are.
    """

    into: tuple[Matrix, ...]
    out: Matrix


@dataclass(frozen=True)
class Order:
    """A new order of a matrix's outputs, or of its inputs.

    Attributes:
        channels: The channel that comes to each place, int64.
        of_inputs: Whether they are its inputs, else its outputs.
    """

    channels: Tensor
    of_inputs: bool

    def __call__(self, matrix_OI: Tensor) -> Tensor:
        """A matrix, its mask or its scores in the new order."""
        channels = self.channels.to(matrix_OI.device)
        if self.of_inputs:
            return matrix_OI[:, channels]
        times = len(matrix_OI) // len(channels)  # of fused matrices, one below the other
        return matrix_OI.unflatten(0, (times, len(channels)))[:, channels].flatten(0, 1)


def find_orders(
    window: AnyWindow,
    scores_of: Callable[[Matrix], Tensor | None],
    patterns: Mapping[str, NM],
) -> dict[str, Order]:
    """New orders of the outputs and inputs of matrices, by their names, that change nothing but what a pattern keeps.

    Args:
        window: The window, dense, in float32.
        scores_of: Scores (O, I) of a matrix; None where it has none.
        patterns: The patterns of matrices with one.
    """
    orders: dict[str, Order] = {}
    for channels in hidden_channels(window):
        scores_OI = scores_of(channels.out) if channels.out.name in patterns else None
        if scores_OI is None:
            continue
        pattern = patterns[channels.out.name]
        order_I = best_order(scores_OI, pattern.n, pattern.m)
        orders |= {matrix.name: Order(order_I, of_inputs=False) for matrix in channels.into}
        orders[channels.out.name] = Order(order_I, of_inputs=True)
    return orders


def hidden_channels(window: AnyWindow) -> Iterator[HiddenChannels]:
    """The hidden channels in a window whose order is free, as a trial with another order shows."""
    plain = {id(one.weight): one for one in window.matrices() if one.weight.dim() == 2 and one.input_dim is not None}
    seen: set[str] = set()
    for module in window.modules():
        own = [plain[id(parameter)] for parameter in module.parameters() if id(parameter) in plain]
        found = _around(own)
        if found and found.out.name not in seen and _is_free(module, found):
            seen.add(found.out.name)
            yield found


def _around(matrices: list[Matrix]) -> HiddenChannels | None:
    """The hidden channels between some matrices, if all but one of them lead to them and that one leads back."""
    shapes = {one.name: tuple(one.by_expert(one.weight).shape[1:]) for one in matrices}
    for out in matrices:
        outputs, inputs = shapes[out.name]
        into = tuple(one for one in matrices if one is not out)
        if into and all(shapes[one.name][0] % inputs == 0 and shapes[one.name][1] == outputs for one in into):
            return HiddenChannels(into, out)
    return None


@torch.no_grad()
def _is_free(module: nn.Module, channels: HiddenChannels) -> bool:
    """Whether a module that maps hidden states to hidden states is the same with its channels in another order."""
    weight_OI = channels.out.by_expert(channels.out.weight)[0]
    generator = torch.Generator().manual_seed(0)
    hidden_1TD = torch.randn(1, 8, len(weight_OI), generator=generator).to(weight_OI)
    order_I = torch.randperm(weight_OI.shape[1], generator=generator)
    try:
        before = module(hidden_1TD)
        with _reordered(channels, order_I):
            after = module(hidden_1TD)
    except Exception:  # whatever it is, it is no function of hidden states alone
        return False
    if not isinstance(before, Tensor) or not before.any():
        return False
    return bool((after - before).abs().max() <= TOLERANCE * before.abs().max())


@contextmanager
def _reordered(channels: HiddenChannels, order_I: Tensor) -> Iterator[None]:
    """A context in which channels are in another order."""
    matrices = (*channels.into, channels.out)
    homes = [(matrix.weight, matrix.weight.data) for matrix in matrices]
    try:
        for matrix in matrices:
            order = Order(order_I, of_inputs=matrix is channels.out)
            moved_OI = order(matrix.by_expert(matrix.weight.data)[0])
            matrix.weight.data = matrix.as_weight(moved_OI[None]).contiguous()
        yield
    finally:
        for weight, home in homes:
            weight.data = home


def best_order(scores_OI: Tensor, n: int, m: int) -> Tensor:
    """An order of the inputs (I) in which N of every M consecutive ones keep much; that of now if none is better.

    Args:
        scores_OI: Scores, at least zero; m divides I.
        n: How many of a group stay.
        m: Inputs of a group.
    """
    scores_OI = scores_OI.float()
    inputs = scores_OI.shape[1]
    by_size_I = scores_OI.sum(0).argsort(descending=True, stable=True)
    order_BM = by_size_I.view(m, inputs // m).T.contiguous()  # the best of each group, then the second best, ...
    for place in range(m if n < m else 0):
        _exchange(scores_OI, order_BM, place, n)
    order_I, now_I = order_BM.flatten(), torch.arange(inputs, device=scores_OI.device)
    return max((now_I, order_I), key=lambda one: float(kept_score(scores_OI[:, one], n, m)))


def _exchange(scores_OI: Tensor, order_BM: Tensor, place: int, n: int) -> None:
    """Exchange the channels at one place of all groups, in place, so that most is kept.

    A channel with score s adds max(s - t, 0) to a row of a group, where t is the N-th largest of the others' scores;
    max(s - t, 0) = (|s - t| + s - t) / 2, so that the sums over rows are distances.
    """
    channels_C = order_BM[:, place].clone()
    others = [other for other in range(order_BM.shape[1]) if other != place]
    rest_OBM = scores_OI[:, order_BM[:, others].flatten()].view(len(scores_OI), len(order_BM), len(others))
    threshold_OB = rest_OBM.topk(n, dim=2).values[:, :, -1]
    scores_OC = scores_OI[:, channels_C]
    distances_BC = torch.cdist(threshold_OB.T.contiguous(), scores_OC.T.contiguous(), p=1)
    gains_BC = (distances_BC + scores_OC.sum(0) - threshold_OB.sum(0)[:, None]) / 2
    _, chosen_B = linear_sum_assignment(gains_BC.double().cpu().numpy(), maximize=True)
    order_BM[:, place] = channels_C[torch.as_tensor(chosen_B, device=channels_C.device)]


def kept_score(scores_OI: Tensor, n: int, m: int) -> Tensor:
    """The sum of the scores that N of every M consecutive inputs keep."""
    return scores_OI.unflatten(1, (-1, m)).topk(n, dim=2).values.sum(dtype=torch.float64)
