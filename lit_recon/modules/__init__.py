"""LightningModules that reconstruct a window, one file each; `module._target_` chooses, also one of your own.

trained.py              what a module trains and changes of its window
masked_weights.py       gradient descent on the weights that pruning left
norms_biases.py         norms and biases alone
mask_lora.py            low-rank changes of the matrices under their masks
untrained.py            nothing: pruning only
least_squares.py        the exact minimiser for one matrix
conjugate_gradients.py  its solver
losses.py               losses between outputs and targets
curves.py               curves that no step waits for
optimizers.py           what an optimizer needs to fit pruned windows; Muon
rates.py                learning rates relative to the weights
schedules.py            the learning rate over a window's steps
"""
