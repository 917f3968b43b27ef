"""How good a model is.

perplexity.py     perplexity, one layer at a time, and its protocol
drift.py          error of each matrix's output, alone and in the sparse model
continuations.py  how models go on with the same prompts, and whether they repeat themselves
harness.py        zero-shot and few-shot tasks, through lm-eval
evaluator.py      the same measures for every state of a run
"""
