"""Numbers and keys of results.json as text.

The page and the table write a number in the same way; None is a dash, and an overflow is named. Seconds and bytes of
other parts of the package are in system/units.py.
"""

import math

LABELS = {  # where the key of results.json alone does not say it
    "model.covered": "share that can be pruned",
    "recipe.windows": "window",
    "recipe.inputs": "window inputs from",
    "recipe.targets": "window targets from",
    "recipe.statistics": "statistics from",
    "protocol.context": "tokens per sequence",
    "protocol.windows": "sequences",
    "protocol.tokens": "predicted tokens",
    "protocol.opening": "opening tokens",
    "protocol.opening_at": "opening before each",
    "protocol.split": "part of the text",
    "tokens.calibration": "calibration tokens",
    "tokens.retraining": "tokens of all layers only",
}


def as_perplexity(value: float | None) -> str:
    """Perplexity with two decimals; a dash for None, "not finite" for NaN and infinity."""
    if value is None:
        return "–"
    return f"{value:,.2f}" if math.isfinite(value) else "not finite"


def as_share(value: float | None) -> str:
    """Share as a percentage with one decimal; a dash for None, NaN and infinity."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.1%}"


def as_error(value: float | None) -> str:
    """Error with three significant digits; a dash for None, "not finite" for NaN and infinity."""
    if value is None:
        return "–"
    return f"{value:#.3g}".rstrip(".") if math.isfinite(value) else "not finite"


def as_nats(value: float) -> str:
    """Difference of log perplexities with three decimals; "not finite" for NaN and infinity."""
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def as_factor(value: float | None) -> str:
    """Factor of a learning rate as it is, such as 0.25; a dash for None and 0, where nothing was trained."""
    return f"{value:g}" if value else "–"


def as_memory(num_bytes: float | None) -> str:
    """Bytes as gigabytes (10^9 bytes) with two decimals; a dash for None."""
    return "–" if num_bytes is None else f"{num_bytes / 1e9:.2f} GB"


def as_count(value: float | None) -> str:
    """Count with thousands apart; a dash for None, NaN and infinity."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.0f}"
