"""Which weights go: criteria score them, patterns turn scores into masks.

criteria/      how important is each weight: one file = one criterion
statistics.py  what a criterion sees of a matrix's inputs
patterns.py    scores to masks: unstructured, N:M
pruner.py      masks of a window, or of a pruning window
masks.py       one bit per weight, in memory and in a file
"""
