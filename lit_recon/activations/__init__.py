"""Hidden states of all samples, and what windows are trained on.

passes.py         run any module over all samples
chain.py          inputs and targets of the current window, and how they advance to the next
boundary.py       hidden states at a window boundary
propagation.py    dense or sparse inputs, targets, statistics, and what each costs
teacher.py        targets recomputed for each batch
token_samples.py  tokens, embedded for each batch, on which all layers are trained at once
datamodule.py     Activations, Batch, and the LightningDataModule over them
matrix_inputs.py  the same for single matrices; gram.py: only their Gram matrices, for least squares
partial_layer.py  a layer up to one of its matrices, with those before it as they will be
block_influence.py   how much each window changes what it is given
window_grams.py   Gram matrices of all matrices of a window, which is pruned or solved for from them
steps.py          what the walk does at once: a window, or a layer with all its matrices
store.py          where hidden states are kept: in memory, or in files (disk_store.py)
"""
