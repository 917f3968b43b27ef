"""Numbers as people read them."""

import pytest

from lit_recon.report.format import as_error, as_memory, as_perplexity, as_share
from lit_recon.system.units import duration


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(0), "0.0 s"),
        (duration(99.94), "99.9 s"),
        (duration(99.96), "1 min 40 s"),
        (duration(125.4), "2 min 05 s"),
        (duration(3599.6), "1 h 00 min"),
        (duration(11400), "3 h 10 min"),
        (as_perplexity(123456.7), "123,456.70"),
        (as_perplexity(float("inf")), "not finite"),
        (as_error(0.0123456), "0.0123"),
        (as_error(0.00001234), "1.23e-05"),
        (as_error(float("nan")), "not finite"),
        (as_share(0.67794), "67.8%"),
        (as_share(float("inf")), "–"),
        (as_memory(1512345678), "1.51 GB"),
        *((as_text(None), "–") for as_text in (as_perplexity, as_share, as_error, as_memory)),
    ],
)
def test_numbers_read_well(text: str, expected: str) -> None:
    assert text == expected
