"""The learning rate over the steps of one window."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear_with_warmup(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Linear warm-up to the optimizer's rate, then linear decay towards zero.

    Differs from transformers.get_linear_schedule_with_warmup in that no step has rate zero: there the first one does,
    which throws away a batch, and a window has few of them (16 in the default run).
    """

    def factor(step: int) -> float:
        rising = (step + 1) / (num_warmup_steps + 1)
        falling = (num_training_steps - step) / max(1, num_training_steps - num_warmup_steps)
        return max(0.0, min(1.0, rising, falling))

    return LambdaLR(optimizer, factor)
