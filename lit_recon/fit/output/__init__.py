"""The output folder of a run: what it leaves behind."""
