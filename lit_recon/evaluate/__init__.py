"""How good a model is.

perplexity.py  perplexity, one layer at a time, and its protocol
evaluator.py   the same measures for every state of a run
"""
