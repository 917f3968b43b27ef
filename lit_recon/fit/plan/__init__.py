"""What a run will take, before any of it is done.

estimate.py       bytes and seconds, for windows and a batch size
global_fit.py     the same of the fit of all layers at once
layer_profile.py  one layer on one real batch
memory_limit.py   batch and windows that fit into a limit
"""
