"""What a run will take, before any of it is done.

estimate.py       bytes and seconds, for windows and a batch size
layer_profile.py  one layer on one real batch
memory_limit.py   batch and windows that fit into a limit
"""
