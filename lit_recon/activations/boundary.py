"""Hidden states of all samples at a window boundary, and how they step over a window.

Shapes: S samples, T tokens, D hidden size.
"""

from collections.abc import Callable, Mapping

from torch import Tensor


class Boundary:
    """Hidden states of all samples at a window boundary, (S, T, D) in the type of their store.

    Attributes:
        states_STD: The states.
        aside_STD: Between the halves of a parallel layer: what the first one adds; None otherwise.
    """

    def __init__(self, states_STD: Tensor) -> None:
        self.states_STD = states_STD
        self.aside_STD: Tensor | None = None

    def step(self, half: str | None, outputs_STD: Tensor, each_batch: Callable[..., None]) -> Tensor | None:
        """Step over a window, given its outputs; the memory that is free now, if any.

        In 16 bits, the sum of a parallel layer's halves is rounded four times, the output of a whole layer once.

        Args:
            half: Which half of a parallel layer the window is, "first" or "second"; None otherwise.
            outputs_STD: Its outputs for `states_STD`; their memory is kept.
            each_batch: Changes the first of some arrays by the others, batch after batch.
        """
        if half == "first":
            each_batch(Tensor.sub_, outputs_STD, self.states_STD)
            self.aside_STD = outputs_STD
            return None
        if half == "second":
            assert self.aside_STD is not None
            each_batch(Tensor.add_, outputs_STD, self.aside_STD)
            self.aside_STD = None
        free_STD, self.states_STD = self.states_STD, outputs_STD
        return free_STD


def correct(targets_BTD: Tensor, outputs_BTD: Tensor, dense_BTD: Tensor, sparse_BTD: Tensor, *, share: float) -> None:
    """Make the targets of a parallel layer's second half where windows correct the sparse chain.

    Both halves contain the residual, so that with plain targets each would make up for all of the chains' difference.
    With a what the first half adds, x the dense chain's states, and z those that the window is trained on:

        target = x + mlp(x) + a(x) - a(z),      a(z) = (1 - share) * a(x) + share * a(sparse chain's states)

    Args:
        targets_BTD: Where they go.
        outputs_BTD: The dense half's outputs, x + mlp(x).
        dense_BTD: What the first half adds in the dense chain.
        sparse_BTD: What it adds in the sparse chain, reconstructed.
        share: Share of the sparse chain in the window's inputs.
    """
    targets_BTD.copy_(outputs_BTD.float() + share * (dense_BTD.float() - sparse_BTD.float()))


def state_of(boundaries: Mapping[str, Boundary]) -> dict[str, Tensor]:
    """The arrays of some boundaries by name, `<name>_aside` for what is aside; not copied."""
    arrays = {}
    for name, boundary in boundaries.items():
        arrays[name] = boundary.states_STD
        if boundary.aside_STD is not None:
            arrays[f"{name}_aside"] = boundary.aside_STD
    return arrays


def check_state(arrays: Mapping[str, Tensor], boundaries: Mapping[str, Boundary]) -> None:
    """Raise a ValueError unless these are arrays of such boundaries."""
    found = _described(arrays, {name.removesuffix("_aside") for name in arrays})
    expected = _described({name: one.states_STD for name, one in boundaries.items()}, set(boundaries))
    if found != expected:
        raise ValueError(
            f"the resume point holds activations of {found}, but with these settings they are {expected}; resume with "
            "the data, chain.* and store.dtype of the run that was interrupted, or start over."
        )


def _described(arrays: Mapping[str, Tensor], chains: set[str]) -> str:
    kinds = {f"{' x '.join(map(str, array.shape))} {str(array.dtype).split('.')[-1]}" for array in arrays.values()}
    return f"the {' and '.join(sorted(chains))} chain, {', '.join(sorted(kinds))}"
