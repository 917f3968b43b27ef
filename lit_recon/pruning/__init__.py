"""Which weights go: criteria score them, patterns turn scores into masks.

criteria/      how important is each weight: one file = one criterion
refine/        better masks, whatever the criterion
allocation/    how much goes where: by rules, one threshold, OWL, errors
statistics.py  what criteria and refinements see of a matrix's inputs
decision.py    what stays of one matrix: score, mask, refined mask, weights
survey.py      the dense model before the walk, layer by layer, for an allocation
patterns.py    scores to masks: unstructured, N:M
permutation.py the order of hidden channels in which an N:M pattern keeps most
pruner.py      masks of a window, or of a pruning window
masks.py       one bit per weight, in memory and in a file
"""
