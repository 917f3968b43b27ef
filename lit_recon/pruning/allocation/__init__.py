"""Where the sparsity goes: a pattern per matrix, or one amount shared out over layers or matrices.

rules.py             patterns by regular expressions on the matrices' names
owl.py               sparsity per layer by its share of outliers (OWL)
by_error.py          sparsity per group that makes the sum of measured errors least
global_threshold.py  one threshold over the scores of many matrices
layers.py            one sparsity for each layer, as patterns of its matrices
table.py             the result for people, and names with their layer numbers collapsed

An allocation looks at all layers through a survey, and says each matrix's pattern.
"""
