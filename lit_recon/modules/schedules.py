"""The learning rate over the steps of one fit: a warm-up to the optimizer's rate, then what the name says.

Unlike the schedules of transformers none has a step with rate zero: there the first one does, which throws away a
batch, and a window has few of them (16 in the default run).
"""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear_with_warmup(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Linear warm-up to the optimizer's rate, then linear decay towards zero."""

    def factor(step: int) -> float:
        rising = (step + 1) / (num_warmup_steps + 1)
        falling = (num_training_steps - step) / max(1, num_training_steps - num_warmup_steps)
        return max(0.0, min(1.0, rising, falling))

    return LambdaLR(optimizer, factor)


def cosine_with_warmup(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Linear warm-up to the optimizer's rate, then half a period of a cosine towards zero."""

    def factor(step: int) -> float:
        done = (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)
        falling = (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2
        return min((step + 1) / (num_warmup_steps + 1), falling)

    return LambdaLR(optimizer, factor)


def constant_with_warmup(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Linear warm-up to the optimizer's rate, which then stays."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (num_warmup_steps + 1)))
