"""Zeros of a Hugging Face model folder, whoever made it: sparsity, N:M patterns, masks, and changes from a dense model.

__main__.py   the command python -m lit_recon.verify: its arguments, and its exit status
request.py    what is asked of a folder, checked before a library is loaded
folder.py     opens the files of a folder, and finds its matrices by architecture or by names
layout.py     where each matrix lies in the files, and which of its dimensions runs over inputs
quantised.py  which quantised weights can be looked at
zeros.py      zeros of one matrix: how many, which N:M patterns hold, masked weights that are not zero
changes.py    how tensors differ from those of the dense model
findings.py   goes through a folder tensor by tensor, and says whether what was asked holds
output.py     findings as a table and as JSON
"""
