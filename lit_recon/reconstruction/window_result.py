"""What the fit of a window came to; each is an entry of results.json."""

from collections.abc import Sequence
from dataclasses import dataclass

from lit_recon.model.windows import AnyWindow


@dataclass(frozen=True, kw_only=True)
class WindowResult:
    """Errors of one window before and after its fit, and whether the fit was accepted.

    Errors are mean squared errors in units of the median energy of the window's dense update, on calibration and on
    held-out samples; `typical` ones are medians over held-out tokens. Those of a window whose loss is on the logits are
    Kullback-Leibler divergences, in nats per token, as `measure` says. Those after are of the weights that were kept;
    what a try reached that was not accepted is in the note. `unit` is that energy, `rate` the factor of the learning
    rate that was kept, `tries` all that were tried with the held-out error that each reached. `lost_by_rounding` is the
    share of what training gained on held-out samples that went as weights were rounded to the model's dtype.
    Of `steps`, `kept_step` led to what was kept; `stopped_early` and `halved` (the rate) say what happened on the way.
    """

    name: str
    relative_error_before: float
    relative_error_after: float
    held_out_before: float
    held_out_after: float
    accepted: bool
    steps: int
    seconds: float
    note: str = ""
    measure: str = "relative error"
    lost_by_rounding: float = 0.0
    typical_before: float = 0.0
    typical_after: float = 0.0
    unit: float = 0.0
    rate: float = 1.0
    tries: Sequence[Sequence[float]] = ()
    kept_step: int = 0
    stopped_early: bool = False
    halved: bool = False

    @property
    def measured(self) -> bool:
        """Whether it has errors: a window that cannot be trained, or needs no training, has none."""
        return self.held_out_before > 0


def kept_pruned(window: AnyWindow, reason: str) -> WindowResult:
    """The result of a window that cannot be trained or needs no training, and so has no error."""
    note = f"{reason}: kept its pruned weights"
    return WindowResult(
        name=window.name,
        relative_error_before=0.0,
        relative_error_after=0.0,
        held_out_before=0.0,
        held_out_after=0.0,
        accepted=False,
        steps=0,
        seconds=0.0,
        note=note,
    )
