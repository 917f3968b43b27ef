"""What a run will take, before any of it is done.

estimate.py       bytes and seconds, for windows and a batch size
device_room.py   what training leaves free on a GPU
description.py    a plan in words, for people
global_fit.py     the same of the fit of all layers at once
layer_profile.py  one layer on one real batch
peak_memory.py    memory by the kind of windows
memory_limit.py   batch and windows that fit into a limit
"""
