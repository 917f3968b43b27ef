"""Which weights go: criteria score them, patterns turn scores into masks."""
