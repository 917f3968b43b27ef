"""Optimizers of torch that need a word before they fit pruned windows.

A pruned weight has gradient zero, and an optimizer that looks at each weight by itself leaves it there. One that
looks at a matrix as a whole does not: after its steps weights are multiplied by their masks.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

ELEMENTWISE = (AdamW, Adam, SGD)  # exactly these classes


class Muon(Optimizer):
    """Muon (Jordan et al. 2024; torch.optim.Muon) for matrices, AdamW for norms, biases and stacks of matrices.

    Muon takes matrices of two dimensions only; fused experts and low-rank factors have three.

    Args:
        params: Parameters or groups of them.
        lr: Rate of both; Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982).
        momentum: Of Muon.
        weight_decay: Of both.
        eps: Of AdamW.

    Raises:
        ValueError: This torch has no Muon.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        eps: float = 1e-15,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"optimizer=muon needs torch 2.9 or newer, and {torch.__version__} is installed; choose another one."
            )
        groups = [one if isinstance(one, dict) else {"params": [one]} for one in params]
        matrices, others = _split(groups, matrices=True), _split(groups, matrices=False)
        self._parts: list[Optimizer] = []
        if matrices:
            own: dict[str, Any] = {
                "momentum": momentum,
                "weight_decay": weight_decay,
                "adjust_lr_fn": "match_rms_adamw",
            }
            self._parts.append(torch.optim.Muon(matrices, lr=lr, **own))
        if others:
            self._parts.append(AdamW(others, lr=lr, eps=eps, weight_decay=weight_decay))
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})
        for part in self._parts:  # one memory, and the same groups, so that rates and states are set for both
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def _split(groups: Iterable[dict[str, Any]], *, matrices: bool) -> list[dict[str, Any]]:
    """The groups with what has two dimensions, or what has not."""
    found = [
        group | {"params": [one for one in group["params"] if (one.dim() == 2) == matrices]}
        for group in (group | {"params": list(group["params"])} for group in groups)
    ]
    return [group for group in found if group["params"]]
