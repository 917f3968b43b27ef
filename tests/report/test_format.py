"""Numbers as text: digits, dashes, overflows."""

import pytest

from lit_recon.report.format import as_error, as_memory, as_nats, as_perplexity, as_share


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (as_perplexity(123456.7), "123,456.70"),
        (as_perplexity(float("inf")), "not finite"),
        (as_error(0.0123456), "0.0123"),
        (as_error(0.00001234), "1.23e-05"),
        (as_error(344.2), "344"),
        (as_error(float("nan")), "not finite"),
        (as_nats(0.60211), "0.602"),
        (as_nats(float("nan")), "not finite"),
        (as_share(0.67794), "67.8%"),
        (as_share(float("inf")), "–"),
        (as_memory(1512345678), "1.51 GB"),
        *((as_text(None), "–") for as_text in (as_perplexity, as_share, as_error, as_memory)),
    ],
)
def test_numbers_read_well(text: str, expected: str) -> None:
    assert text == expected
