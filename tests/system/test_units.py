"""Bytes and seconds as text."""

import pytest

from lit_recon.system.units import duration, in_gb


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(0), "0.0 s"),
        (duration(99.94), "99.9 s"),
        (duration(99.96), "1 min 40 s"),
        (duration(125.4), "2 min 05 s"),
        (duration(3599.6), "1 h 00 min"),
        (duration(11400), "3 h 10 min"),
        (in_gb(1_512_345_678), "1.51 GB"),
        (in_gb(10_000_000), "0.01 GB"),
        (in_gb(9_999_000), "10.00 MB"),
        (in_gb(2_500), "0.00 MB"),
    ],
)
def test_bytes_and_seconds_read_well(text: str, expected: str) -> None:
    assert text == expected
