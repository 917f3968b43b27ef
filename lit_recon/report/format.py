"""Numbers and keys of results.json as people read them."""

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
    "tokens.calibration": "calibration tokens",
}


def as_perplexity(value: float | None) -> str:
    """Two decimals; a dash for none, and a word for one that overflowed."""
    if value is None:
        return "–"
    return f"{value:,.2f}" if math.isfinite(value) else "not finite"


def as_share(value: float | None) -> str:
    """A percentage with one decimal; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.1%}"


def as_error(value: float | None) -> str:
    """Three significant digits; a dash for none, and a word for one that overflowed."""
    if value is None:
        return "–"
    return f"{value:#.3g}" if math.isfinite(value) else "not finite"


def as_memory(num_bytes: float | None) -> str:
    """Gigabytes (10^9 bytes) with two decimals; a dash for none."""
    return "–" if num_bytes is None else f"{num_bytes / 1e9:.2f} GB"
