"""Bytes and seconds as text: "1.51 GB", "2 min 05 s"."""


def in_gb(size: int) -> str:
    """Bytes as text: "1.51 GB", below 10 MB "2.50 MB" (10^9 and 10^6 bytes)."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """Seconds as text: "7.3 s", "2 min 05 s", "3 h 10 min"."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
