"""Settings of the fit of every window, whatever its module."""

from collections.abc import Sequence
from dataclasses import dataclass

RETRY_RATES = (1 / 4, 1 / 16)  # conf/module/masked_weights.yaml
KEEP = ("last", "best")
START = ("none", "least_squares")


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a window is tried, and which of the states that it went through is kept.

    Attributes:
        retry_rates: Shares of the learning rate at which a window that did not improve is tried again, in this order.
        keep: "last": the state after the last step; "best": that with the smallest loss on held-out samples, of all
            points of its curve, the pruned weights among them.
        patience: Training ends when the loss on held-out samples has not become smaller at so many points in a row;
            None: never.
        start: What is trained: "none", the pruned weights; "least_squares", every matrix solved for on its mask's
            support first (start.py).
    """

    retry_rates: Sequence[float] = RETRY_RATES
    keep: str = "last"
    patience: int | None = None
    start: str = "none"

    def __post_init__(self) -> None:
        """Check the settings; all problems in one message."""
        rates, problems = self.retry_rates, []
        if not isinstance(rates, (list, tuple)) or not all(type(one) in (int, float) and 0 < one < 1 for one in rates):
            problems.append(
                f"module.retry_rates={rates}: expected shares of the learning rate between 0 and 1, such as "
                "[0.25,0.0625], or [] for one try per window."
            )
        if self.keep not in KEEP:
            problems.append(f"keep={self.keep}: expected one of {', '.join(KEEP)}.")
        if self.start not in START:
            problems.append(f"start={self.start}: expected one of {', '.join(START)}.")
        if self.patience is not None and (type(self.patience) is not int or self.patience < 1):
            problems.append(f"patience={self.patience}: expected a number of validations, 1 or more, or null.")
        if problems:
            raise ValueError("\n".join(problems))

    def describe(self) -> dict[str, str]:
        """What differs from the defaults, for a run's recipe."""
        found = {"keep": self.keep, "patience": str(self.patience), "start": self.start}
        found["retry_rates"] = ", ".join(map(str, self.retry_rates)) or "none"
        usual = {"keep": "last", "patience": "None", "start": "none", "retry_rates": ", ".join(map(str, RETRY_RATES))}
        return {name: text for name, text in found.items() if text != usual[name]}
