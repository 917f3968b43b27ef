"""The method: the walk over the windows, and the fit of each.

driver.py             the walk, one screen
window_fit.py         fit a window; accept it or keep its pruned weights
fitted_weights.py     weights that a fit changes: copied, rounded, put back
tensorboard.py        one log for all windows
trainer_callbacks.py  learning rate, first point of the curves, divergence
"""
